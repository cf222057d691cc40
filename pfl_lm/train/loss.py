"""Token losses of a causal language model, summed and never averaged early.

A mean of means weighs a short answer's tokens more than a long one's. So the sum and the number of
supervised tokens travel separately, and whoever needs a mean divides once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pfl_lm.data.batches import IGNORED, predicting
from pfl_lm.model.head import logits_at, top_of
from pfl_lm.model.trunk import Trunk


def nll_sum(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the negative log-likelihood of a batch's supervised tokens, in nats, as a scalar.

    ``input_ids``, ``attention_mask`` and ``labels`` have shape ``(batch, seq)``; a label is the
    token at its own position, predicted from the position before. ``positions``, if it is there,
    are those that predict a supervised token, ``(n,)``, into the batch flattened; ``rows`` save a
    `Trunk` from asking the device which rows they are.
    """
    inputs, positions, wanted = _asked(model, batch)
    if (top := top_of(model, inputs, positions)) is not None:
        return top.nll(wanted).sum()
    logits = logits_at(model, inputs, positions).float()
    return F.cross_entropy(logits, wanted, reduction="sum")


def nll_by_row(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the negative log-likelihood of each row's supervised tokens, in nats, ``(batch,)``."""
    inputs, positions, wanted = _asked(model, batch)
    if (top := top_of(model, inputs, positions)) is not None:
        return _by_row(top.nll(wanted), positions, batch)
    logits = logits_at(model, inputs, positions).float()
    return _by_row(F.cross_entropy(logits, wanted, reduction="none"), positions, batch)


def mean_nll_by_row(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return each row's nll by its own supervised tokens, ``(batch,)``: a row is one record."""
    return nll_by_row(model, batch) / _n_supervised(batch)


def error_by_row(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the share of each row's supervised tokens that are not the first guess, ``(batch,)``.

    Where a model's numbers are not finite, it is wrong.
    """
    inputs, positions, wanted = _asked(model, batch)
    top = top_of(model, inputs, positions)
    parts = [logits_at(model, inputs, positions)] if top is None else top.logits()
    highest, guess = (
        torch.cat(found)
        for found in zip(*(part.float().max(dim=-1) for part in parts), strict=True)
    )
    wrong = ((guess != wanted) | ~highest.isfinite()).float()
    return _by_row(wrong, positions, batch) / _n_supervised(batch)


def _asked(model: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return what the model is given, where it predicts, and what it should, both ``(n,)``."""
    labels: Tensor = batch["labels"]
    positions = batch["positions"] if "positions" in batch else predicting(labels)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if isinstance(model, Trunk) and "rows" in batch:
        inputs["rows"] = batch["rows"]
    return {**inputs, "use_cache": False}, positions, labels.flatten()[positions + 1]


def _n_supervised(batch: Mapping[str, Any]) -> Tensor:
    """Return by how many tokens to divide what was summed over each row's supervised ones."""
    n: Tensor = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
    return n.clamp(min=1)


def _by_row(by_token: Tensor, positions: Tensor, batch: Mapping[str, Any]) -> Tensor:
    labels: Tensor = batch["labels"]
    everywhere = by_token.new_zeros(labels.numel())
    rows: Tensor = everywhere.index_put((positions,), by_token).view(labels.shape)
    return rows.sum(dim=1)

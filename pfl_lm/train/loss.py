"""Losses of what a model predicts, summed and never averaged early.

A mean of means weighs a short answer's tokens more than a long one's. So the sum and the number of
supervised tokens travel separately, and whoever needs a mean divides once.

What is predicted is told by the batch. ``labels``: tokens of a text, each from those before it.
``targets``: what a decoder writes, from the encoder's text and what it has written. ``classes``:
one class a row, which counts as one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pfl_lm.data.batches import IGNORED, predicting
from pfl_lm.model.head import logits_at, top_of
from pfl_lm.model.trunk import Trunk


class Guessed(NamedTuple):
    """What a model makes of a batch, row by row.

    Attributes:
        nll: of each row's supervised tokens, summed, nats, ``(batch,)``.
        right: how many of them are the model's first guess, ``(batch,)``.
        classes: the class that is its first guess, int64 ``(batch,)``; None where rows have none.
    """

    nll: Tensor
    right: Tensor
    classes: Tensor | None = None


def nll_sum(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the negative log-likelihood of a batch's supervised tokens, in nats, as a scalar.

    ``input_ids``, ``attention_mask`` and ``labels`` have shape ``(batch, seq)``; a label is the
    token at its own position, predicted from the position before. ``positions``, if it is there,
    are those that predict a supervised token, ``(n,)``, into the batch flattened; ``rows`` save a
    `Trunk` from asking the device which rows they are.
    """
    if "classes" in batch:
        return F.cross_entropy(_class_logits(model, batch), batch["classes"], reduction="sum")
    inputs, positions, wanted = _asked(model, batch)
    if (top := top_of(model, inputs, positions)) is not None:
        return top.nll(wanted).sum()
    logits = logits_at(model, inputs, positions).float()
    return F.cross_entropy(logits, wanted, reduction="sum")


def nll_by_row(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the negative log-likelihood of each row's supervised tokens, in nats, ``(batch,)``."""
    if "classes" in batch:
        return F.cross_entropy(_class_logits(model, batch), batch["classes"], reduction="none")
    inputs, positions, wanted = _asked(model, batch)
    if (top := top_of(model, inputs, positions)) is not None:
        return _by_row(top.nll(wanted), positions, batch)
    logits = logits_at(model, inputs, positions).float()
    return _by_row(F.cross_entropy(logits, wanted, reduction="none"), positions, batch)


def mean_nll_by_row(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return each row's nll by its own supervised tokens, ``(batch,)``: a row is one record."""
    nll = nll_by_row(model, batch)
    return nll if "classes" in batch else nll / _n_supervised(batch)


@torch.no_grad()
def guessed(model: Any, batch: Mapping[str, Any]) -> Guessed:
    """Return what `nll_by_row` does, to the bit, and from the same forward pass what is guessed."""
    if "classes" in batch:
        logits, wanted = _class_logits(model, batch), batch["classes"]
        guess = logits.argmax(dim=-1)
        nll = F.cross_entropy(logits, wanted, reduction="none")
        return Guessed(nll, (guess == wanted).float(), guess)
    inputs, positions, wanted = _asked(model, batch)
    if (top := top_of(model, inputs, positions)) is not None:
        nll, guess = top.guessed(wanted)
    else:
        logits = logits_at(model, inputs, positions).float()
        nll, guess = F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(dim=-1)
    right = _by_row((guess == wanted).float(), positions, batch)
    return Guessed(_by_row(nll, positions, batch), right)


def error_by_row(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the share of each row's supervised tokens that are not the first guess, ``(batch,)``.

    Where a model's numbers are not finite, it is wrong.
    """
    if "classes" in batch:
        highest, guess = _class_logits(model, batch).max(dim=-1)
        missed: Tensor = (guess != batch["classes"]) | ~highest.isfinite()
        return missed.float()
    inputs, positions, wanted = _asked(model, batch)
    top = top_of(model, inputs, positions)
    parts = [logits_at(model, inputs, positions)] if top is None else top.logits()
    highest, guess = (
        torch.cat(found)
        for found in zip(*(part.float().max(dim=-1) for part in parts), strict=True)
    )
    wrong = ((guess != wanted) | ~highest.isfinite()).float()
    return _by_row(wrong, positions, batch) / _n_supervised(batch)


def _class_logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return what a classifier says of each row, ``(batch, classes)`` in float32."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits: Tensor = model(**inputs).logits
    return logits.float()


def _asked(model: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return what the model is given, where it predicts, and what it should, both ``(n,)``."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if "targets" in batch:
        targets: Tensor = batch["targets"]
        before = model.prepare_decoder_input_ids_from_labels(targets)
        positions = (targets.flatten() != IGNORED).nonzero()[:, 0]
        given = {**inputs, "decoder_input_ids": before, "use_cache": False}
        return given, positions, targets.flatten()[positions]
    labels: Tensor = batch["labels"]
    positions = batch["positions"] if "positions" in batch else predicting(labels)
    if isinstance(model, Trunk) and "rows" in batch:
        inputs["rows"] = batch["rows"]
    return {**inputs, "use_cache": False}, positions, labels.flatten()[positions + 1]


def _n_supervised(batch: Mapping[str, Any]) -> Tensor:
    """Return by how many tokens to divide what was summed over each row's supervised ones."""
    counted = batch["targets"] if "targets" in batch else batch["labels"][:, 1:]
    n: Tensor = (counted != IGNORED).sum(dim=1)
    return n.clamp(min=1)


def _by_row(by_token: Tensor, positions: Tensor, batch: Mapping[str, Any]) -> Tensor:
    labels: Tensor = batch["targets"] if "targets" in batch else batch["labels"]
    everywhere = by_token.new_zeros(labels.numel())
    rows: Tensor = everywhere.index_put((positions,), by_token).view(labels.shape)
    return rows.sum(dim=1)

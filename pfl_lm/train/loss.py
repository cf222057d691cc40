"""Token losses of a causal language model, summed and never averaged early.

A mean of means weighs a short answer's tokens more than a long one's. So the sum and the number of
supervised tokens travel separately, and whoever needs a mean divides once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a position that carries no loss."""


def nll_sum(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the negative log-likelihood of a batch's supervised tokens, in nats, as a scalar.

    ``input_ids``, ``attention_mask`` and ``labels`` have shape ``(batch, seq)``; a label is the
    token at its own position, predicted from the position before.
    """
    logits, labels = _predictions(model, batch)
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def nll_by_row(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the negative log-likelihood of each row's supervised tokens, in nats, ``(batch,)``."""
    logits, labels = _predictions(model, batch)
    by_token = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return by_token.view(labels.shape).sum(dim=1)


def mean_nll_by_row(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return each row's nll by its own supervised tokens, ``(batch,)``: a row is one record."""
    n_supervised: Tensor = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
    return nll_by_row(model, batch) / n_supervised.clamp(min=1)


def error_by_row(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the share of each row's supervised tokens that are not the first guess, ``(batch,)``.

    Where a model's numbers are not finite, it is wrong.
    """
    logits, labels = _predictions(model, batch)
    highest, guess = logits.max(dim=-1)
    supervised = labels != IGNORED
    wrong = ((guess != labels) | ~highest.isfinite()) & supervised
    return wrong.sum(dim=1) / supervised.sum(dim=1).clamp(min=1)


def _predictions(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    outputs = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    return outputs.logits[:, :-1].float(), batch["labels"][:, 1:]

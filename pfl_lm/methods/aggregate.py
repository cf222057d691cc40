"""The pure averages that methods share.

Sums are taken in float64, in the order given (client-id order by contract), and rounded to fp32
once. Equal vectors therefore average to themselves, bit for bit, whatever the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from pfl_lm.errors import AggregationError
from pfl_lm.layout import Vector

if TYPE_CHECKING:
    from pfl_lm.methods.base import LocalRun, Upload

Weighting = Literal["examples", "tokens", "uniform"]


def upload_weight(weighting: Weighting, run: LocalRun) -> float:
    """Return what a client weighs in averages: its train rows, their supervised tokens, or 1."""
    match weighting:
        case "examples":
            return run.n_examples
        case "tokens":
            return run.n_tokens
        case "uniform":
            return 1


def mean_upload(uploads: Sequence[Upload], name: str) -> Vector:
    """Return the weighted mean of one vector of every upload.

    Raises:
        AggregationError: as `weighted_mean`.
    """
    vectors = [upload.vectors[name] for upload in uploads]
    return weighted_mean(vectors, [upload.weight for upload in uploads])


def weighted_mean(vectors: Sequence[Vector], weights: Sequence[float]) -> Vector:
    """Return Σ n_k w_k / Σ n_k over ``(d,)`` vectors, in fp32.

    Raises:
        AggregationError: there are no vectors, their lengths differ, a weight is negative or not
            finite, or all weights are zero.
    """
    if not vectors or len(vectors) != len(weights):
        raise AggregationError(f"cannot average {len(vectors)} vectors with {len(weights)} weights")
    if len({vector.shape for vector in vectors}) != 1:
        raise AggregationError(
            f"cannot average vectors of different shapes: {[tuple(v.shape) for v in vectors]}"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise AggregationError(f"weights must be finite, >= 0 and not all zero: {list(weights)}")
    total = torch.zeros_like(vectors[0], dtype=torch.float64)
    for vector, weight in zip(vectors, weights, strict=True):
        total.add_(vector.to(torch.float64), alpha=weight)
    return total.div_(math.fsum(weights)).to(torch.float32)

"""Averages that a few bad uploads cannot move at will. Each is of the changes d_k = w_k - w_g.

    clipped mean    w_g + Σ_k p_k d_k min(1, C / ‖d_k‖₂),    p_k = n_k / Σ n_k
    trimmed mean    of each coordinate: without its c smallest and its c largest, unweighted
    median          of each coordinate: the one in the middle, or the mean of the two

Norm clipping: Sun et al., "Can You Really Backdoor Federated Learning?", arXiv 1911.07963.
Median and trimmed mean: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", arXiv 1803.01498, definitions 1 and 2.

Of the last two, w_g + rule(d_k) = rule(w_k), since a constant changes no order; so they are taken
of the w_k, and w_g rounds nothing. Weights play no part in them: a client that weighs 0 counts as
any other. The median is the trimmed mean that cuts all but the middle. Of one or two uploads, or
with c = 0, either is the unweighted mean.

The clipped mean takes one pass. The others sort ``CHUNK_BYTES`` of numbers at a time, all clients'
of some coordinates. They read every upload whole once, to check it, and then of each only the
coordinates at hand, so that in all every number is read twice. What is sorted must have the SHA-256
of what was checked: an upload that changes in between is noticed, however it changes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from pfl_lm.errors import AggregationError
from pfl_lm.layout import Vector
from pfl_lm.methods.aggregate import Weighted, WeightedVectors, checked, in_columns

CHUNK_BYTES = 64 * 2**20


def clipped_mean(weighted: Iterable[Weighted], global_weights: Vector, clip_norm: float) -> Vector:
    """Return w_g + Σ p_k d_k min(1, C/‖d_k‖₂) in fp32, in one pass; C is ``clip_norm``.

    No upload moves the result by more than p_k C, the whole of them by no more than C.

    Raises:
        AggregationError: as `checked`, or the vectors' shape is not that of the global weights.
    """
    start = global_weights.to(torch.float64)
    total, weights = torch.zeros_like(start), list[float]()
    for vector, weight in checked(weighted, global_weights):
        change = vector.to(torch.float64) - start
        norm = float(torch.linalg.vector_norm(change))
        total.add_(change, alpha=weight * (clip_norm / norm if norm > clip_norm else 1.0))
        weights.append(weight)
    return total.div_(math.fsum(weights)).add_(start).to(torch.float32)


def median(weighted: WeightedVectors, chunk_bytes: int = CHUNK_BYTES) -> Vector:
    """Return the median of each coordinate in fp32; of an even number, the mean of the middle two.

    Raises:
        AggregationError: as `checked`.
    """
    return trimmed_mean(weighted, max(0, len(weighted) - 1) // 2, chunk_bytes)


def trimmed_mean(weighted: WeightedVectors, cut: int, chunk_bytes: int = CHUNK_BYTES) -> Vector:
    """Return the mean of each coordinate without its ``cut`` smallest and ``cut`` largest, in fp32.

    Sums go from the smallest up, so that neither the uploads' order nor ``chunk_bytes`` matters.

    Args:
        weighted: is gone through several times; its weights are checked and not used.
        cut: how many go on each side; at least one must be left.
        chunk_bytes: how much may be sorted at a time.

    Raises:
        AggregationError: as `checked`, or what is averaged has changed meanwhile.
    """
    n = len(weighted)
    width = max(1, chunk_bytes // (4 * max(1, n)))
    result, digests = _check(weighted, width)
    assert 0 <= 2 * cut < n
    for begin, digest in zip(range(0, len(result), width), digests, strict=True):
        columns = slice(begin, min(begin + width, len(result)))
        middle = _middle(weighted, columns, cut, digest)
        result[columns] = torch.from_numpy(middle).to(torch.float32)
    return result


def _check(weighted: WeightedVectors, width: int) -> tuple[Vector, list[bytes]]:
    """Check all; return zeros of their shape, and the SHA-256 of each ``width`` columns of them."""
    like = torch.zeros(0)
    digests: list[hashlib._Hash] = []
    for vector, _ in checked(weighted):
        like = vector
        numbers = _numbers(vector)
        begins = range(0, len(numbers), width)
        digests = digests or [hashlib.sha256() for _ in begins]
        for digest, begin in zip(digests, begins, strict=True):
            digest.update(numbers[begin : begin + width].data)
    return torch.zeros_like(like, dtype=torch.float32), [digest.digest() for digest in digests]


def _middle(
    weighted: WeightedVectors, columns: slice, cut: int, digest: bytes
) -> NDArray[np.float64]:
    """Return ``(width,)``: some coordinates' means, each without its ``cut`` least and greatest.

    ``digest``: what the SHA-256 of these coordinates has to be.
    """
    n = len(weighted)
    table = np.empty((n, columns.stop - columns.start), dtype=np.float32)
    for row, part in zip(table, in_columns(weighted, columns), strict=True):
        row[:] = _numbers(part)
    if hashlib.sha256(table.data).digest() != digest:
        raise _changed(weighted)
    table.sort(axis=0)
    total = np.zeros(table.shape[1])
    for row in table[cut : n - cut]:
        total += row
    return total / (n - 2 * cut)


def _numbers(vector: Vector) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = vector.to(torch.float32).cpu().contiguous().numpy()
    return numbers


def _changed(weighted: WeightedVectors) -> AggregationError:
    """Return what to raise over uploads that are others now; those on disk say first which."""
    for _ in weighted:
        pass
    return AggregationError(
        "an upload has changed while it was averaged",
        hint="nothing of this round was averaged: see that nobody else writes there, then resume",
    )

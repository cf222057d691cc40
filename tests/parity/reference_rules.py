"""The aggregation rules in float64 numpy, on changes d = w - w_g, a formula a line.

Written from arXiv 1911.07963 (norm clipping) and 1803.01498 (median, trimmed mean), never from
`pfl_lm.methods`. ``changes`` has shape ``(n, d)``; each returns the ``(d,)`` change of w_g.
"""

from __future__ import annotations

import math

import numpy as np


def clipped_mean(changes: np.ndarray, weights: list[float], clip_norm: float) -> np.ndarray:
    total = np.zeros(changes.shape[1])
    for change, weight in zip(changes, weights, strict=True):
        length = math.sqrt(math.fsum(x * x for x in change))
        total += weight / math.fsum(weights) * change / max(1.0, length / clip_norm)
    return total


def median(changes: np.ndarray) -> np.ndarray:
    return np.median(changes, axis=0)


def trimmed_mean(changes: np.ndarray, cut: int) -> np.ndarray:
    """Coordinate by coordinate: sort, cut, average."""
    found = []
    for column in changes.T:
        kept = sorted(column)[cut : len(column) - cut]
        found.append(math.fsum(kept) / len(kept))
    return np.array(found)

"""How far a difference between two methods can be trusted: a paired bootstrap.

    D[s, c]   loss of one method minus the other's, with seed s, on client c; below zero is better
    D̄*        mean of D[s*, c*] over S seeds and C clients, each drawn with replacement, apart

Clients and seeds are drawn independently and crossed (Owen, "The pigeonhole bootstrap", Annals of
Applied Statistics 1, 2007): a client keeps its row in every seed drawn. The interval is a
percentile interval of D̄*, widened for few clients (Hesterberg, "What Teachers Should Know About
the Bootstrap", The American Statistician 69, 2015): its tails are

    Φ( -√(C/(C-1)) · t_{C-1} )        t_{C-1}: Student's quantile of the level asked for

in place of (1 - level) / 2. It says what to expect of other clients like these and of other seeds.
It does not know how few test rows a client has, nor that several intervals stand beside each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 10_000
LEAST_CLIENTS = math.ceil(1 + math.log2(1 / (1 - LEVEL)))
"""With fewer, not even the whole range of the data holds the mean as often as the level says.

The range of C independent values misses their median with probability 2^(1-C).
"""

_AT_ONCE = 2_000_000
"""How many numbers are drawn at a time."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference and where it may lie, nats a token; NaN where that cannot be said."""

    estimate: float
    low: float
    high: float


def paired_interval(
    differences: Array, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the interval of the mean of ``differences``, (S seeds, C clients), none of them NaN.

    The draws follow from ``seed`` and the shape alone.

    Raises:
        ValueError: it is no such table.
    """
    if differences.ndim != 2 or not np.isfinite(differences).all():
        raise ValueError("needs a table of finite numbers, seeds by clients")
    n_seeds, n_clients = differences.shape
    if n_seeds == 0 or n_clients == 0:
        return Interval(math.nan, math.nan, math.nan)
    estimate = float(differences.mean())
    if n_clients < 2:
        return Interval(estimate, math.nan, math.nan)
    tail = tail_for(n_clients, level)
    low, high = np.quantile(resampled_means(differences, resamples, seed), (tail, 1 - tail))
    return Interval(estimate, float(low), float(high))


def resampled_means(differences: Array, resamples: int, seed: int) -> Array:
    """Return the mean over drawn seeds and drawn clients, ``(resamples,)``.

    How often each is drawn is multinomial, so a mean is a product of counts with the table.
    """
    draw = np.random.default_rng(seed)
    n_seeds, n_clients = differences.shape
    means = np.empty(resamples)
    step = max(1, _AT_ONCE // (n_seeds + n_clients))
    for start in range(0, resamples, step):
        n = min(step, resamples - start)
        seeds = draw.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n)
        clients = draw.multinomial(n_clients, np.full(n_clients, 1 / n_clients), size=n)
        sums = ((seeds @ differences) * clients).sum(axis=1)
        means[start : start + n] = sums / (n_seeds * n_clients)
    return means


def tail_for(n_clients: int, level: float) -> float:
    """Return the share of resampled means to leave out at each end; two clients at least."""
    t = student_quantile((1 + level) / 2, n_clients - 1)
    return NormalDist().cdf(-math.sqrt(n_clients / (n_clients - 1)) * t)


def student_quantile(p: float, degrees: int) -> float:
    """Return the quantile of Student's distribution for p from 1/2 to 1, by bisection."""
    low, high = 0.0, 1.0
    while _student_cdf(high, degrees) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, degrees: int) -> float:
    """Abramowitz and Stegun 26.7.3 and 26.7.4: a finite sum for whole degrees of freedom."""
    angle = math.atan(t / math.sqrt(degrees))
    cos2 = math.cos(angle) ** 2
    odd = degrees % 2
    term, total = 1.0, 1.0 if degrees > 1 else 0.0
    for k in range(1, (degrees - odd) // 2):
        term *= cos2 * ((2 * k) / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
        total += term
    if odd:
        between = 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
    else:
        between = math.sin(angle) * total
    return 0.5 + between / 2

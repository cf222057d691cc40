"""What one number a client comes to, over all clients: not only on average, but for the worst off.

Losses are nats a supervised token, so lower is better and the worst off are those with the highest.
Every function is plain algebra on one number, or one row of seeds, a client.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

TAIL = 0.9


@dataclass(frozen=True, slots=True)
class Spread:
    """The losses of one model a client, in a few numbers.

    Attributes:
        mean: every client counts once.
        weighted: every scored row counts once.
        worst: of the client that is worst off.
        tail: a tenth of the clients are at least as badly off: the 90th percentile, linear.
        std: standard deviation over clients (by n, not n - 1): how unequal they are.
    """

    mean: float
    weighted: float
    worst: float
    tail: float
    std: float


def spread(losses: Array, rows: Array) -> Spread:
    """Return the spread of ``losses``, one a client, whose scored ``rows`` are their weights."""
    return Spread(
        mean=float(losses.mean()),
        weighted=float(np.average(losses, weights=rows)),
        worst=float(losses.max()),
        tail=float(np.quantile(losses, TAIL)),
        std=float(losses.std()),
    )


def n_harmed(losses: Array, floor: Array) -> int:
    """Return how many clients are worse off than with ``floor``, a loss a client as well."""
    return int((losses > floor).sum())


def win_share(row: Array, column: Array) -> float:
    """Return the share of (seed, client) pairs in which ``row`` has the lower loss.

    Both are tables of seeds by clients. NaN stands for a run that has diverged: who has not wins.
    Ties are won by neither.
    """
    won = (row < column) | (np.isfinite(row) & np.isnan(column))
    return float(won.mean()) if won.size else float("nan")

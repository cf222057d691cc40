"""What the noise comes to: each client's ε, as a function of its committed turns and nothing else.

    rows      every step of every turn is a Gaussian mechanism on a Poisson sample, σ and q
              as the turn noted them; they compose over all of the client's turns
    clients   every round a client took part in is a Gaussian mechanism, σ as the recipe has it;
              nothing is gained by sampling, since whoever knows the recipe can draw the cohorts

By Rényi differential privacy, through Opacus' analysis: Mironov et al., "Rényi Differential Privacy
of the Sampled Gaussian Mechanism", arXiv 1908.10530; to (ε, δ) by Balle et al., arXiv 1905.09982,
Theorem 21. The result is an upper bound. Neighbours differ by one row of a client, or one client,
being there or not, while the numbers of rows and of clients are known. No torch here.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pfl_lm.recipe import PrivacyOptions

_ORDERS = (*(1 + k / 10 for k in range(1, 100)), *range(11, 64), 64, 80, 96, 128, 192, 256, 512)
"""Rényi orders α of which the best is taken; the large ones are for much noise."""

_USELESS = 10_000
"""From here on ε is not told: e^ε bounds nothing that anybody could observe."""

Turn = tuple[str, Mapping[str, float]]
"""Whose turn it was, and the numbers it was committed with."""
Mechanism = tuple[float, float]
"""σ and q of one Gaussian mechanism on a sample; q = 1 is no sampling."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What one lever's mechanisms come to: (ε, δ); ε is infinite where nothing is bounded."""

    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True)
class ClientSpent:
    """What a client's data has spent, by lever; None for a lever that is not set."""

    record_level: Spent | None = None
    client_level: Spent | None = None


NO_LEVER = ClientSpent()


def expected_rows(n_rows: int, rows_in_step: int) -> int:
    """Return how many of a client's rows a step has on average: q n."""
    return min(rows_in_step, n_rows)


def noted(sigma: float, n_rows: int, rows_in_step: int, steps: int) -> dict[str, float]:
    """Return what a turn of so many private steps writes into its summary, to be read again here.

    ``n_rows`` are the client's train rows, of which a step has ``rows_in_step`` on average, at most
    all.
    """
    return {
        "dp_noise_multiplier": sigma,
        "dp_sample_rate": expected_rows(n_rows, rows_in_step) / n_rows,
        "dp_steps": float(steps),
    }


def spent_by_client(
    turns: Iterable[Turn], privacy: PrivacyOptions, clients: Iterable[str]
) -> dict[str, ClientSpent]:
    """Return what each client has spent over its turns; one without turns has spent ε = 0.

    Without a lever the turns are not gone through.
    """
    if privacy.first_asked is None:
        return dict.fromkeys(clients, NO_LEVER)
    steps: dict[str, Counter[Mechanism]] = {client: Counter() for client in clients}
    rounds = Counter[str]()
    for client, summary in turns:
        rounds[client] += 1
        noted = (summary.get("dp_noise_multiplier", 0.0), summary.get("dp_sample_rate", 1.0))
        steps[client][noted] += int(summary.get("dp_steps", 1))  # σ = 0: a turn without noise
    record, level = privacy.record_level, privacy.client_level
    return {
        client: ClientSpent(
            None if record is None else spent(mechanisms, record.delta),
            None
            if level is None
            else spent({(level.noise_multiplier, 1.0): rounds[client]}, level.delta),
        )
        for client, mechanisms in steps.items()
    }


def spent(mechanisms: Mapping[Mechanism, int], delta: float) -> Spent:
    """Return what mechanisms, each so many times, come to at this δ."""
    times = {mechanism: n for mechanism, n in mechanisms.items() if n}
    if not times:
        return Spent(0.0, delta)
    if min(times)[0] <= 0:
        return Spent(math.inf, delta)
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = [
        math.fsum(n * _renyi(*mechanism)[k] for mechanism, n in times.items())
        for k in range(len(_ORDERS))
    ]
    with warnings.catch_warnings():  # the best order may be the first or the last: still a bound
        warnings.filterwarnings("ignore", message="Optimal order is the")
        epsilon, _ = get_privacy_spent(orders=_ORDERS, rdp=total, delta=delta)
    return Spent(max(0.0, float(epsilon)), delta)


@lru_cache(maxsize=4096)
def _renyi(sigma: float, rate: float) -> tuple[float, ...]:
    """Return one mechanism's Rényi divergence at every order."""
    return tuple(_at_order(sigma, rate, order) for order in _ORDERS)


def _at_order(sigma: float, rate: float, order: float) -> float:
    from opacus.accountants.analysis.rdp import compute_rdp

    try:
        return float(compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=float(order)))
    except (ArithmeticError, ValueError):  # beyond what floats can sum: no bound at this order
        return math.inf


def largest(spent_by: Mapping[str, ClientSpent]) -> ClientSpent:
    """Return the largest ε of any client, lever by lever."""
    return ClientSpent(
        _most(each.record_level for each in spent_by.values()),
        _most(each.client_level for each in spent_by.values()),
    )


def _most(all_spent: Iterable[Spent | None]) -> Spent | None:
    return max((s for s in all_spent if s is not None), key=lambda s: s.epsilon, default=None)


def said(spent: Spent) -> str:
    """Return ε and δ as text, ε rounded up: never less than was spent."""
    delta = f"at δ = {spent.delta:g}"
    if spent.epsilon >= _USELESS:
        return f"ε above {_USELESS:g} {delta}"
    digits = 0 if spent.epsilon >= 100 else 2 if spent.epsilon >= 0.1 else 4
    return f"ε = {math.ceil(spent.epsilon * 10**digits) / 10**digits:.{digits}f} {delta}"

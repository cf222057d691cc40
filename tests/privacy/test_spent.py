"""What was spent: against the exact Gaussian mechanism, an integral by hand, and Opacus."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.special import log_ndtr  # type: ignore[import-untyped]

from pfl_lm.privacy.spent import (
    _ORDERS,
    NO_LEVER,
    ClientSpent,
    Spent,
    _at_order,
    largest,
    noted,
    said,
    spent,
    spent_by_client,
)
from pfl_lm.recipe import ClientLevelOptions, PrivacyOptions, RecordLevelOptions

RECORD = RecordLevelOptions(noise_multiplier=1.1, max_grad_norm=1.0, delta=1e-5)
CLIENT = ClientLevelOptions(noise_multiplier=4.0, clip_norm=1.0, delta=1e-3)


def exact_gaussian(sigma: float, times: int, delta: float) -> float:
    """Return the exact ε of Gaussian mechanisms without sampling (Balle and Wang, 1805.06530)."""
    mu = math.sqrt(times) / sigma

    def delta_at(epsilon: float) -> float:
        first = math.exp(log_ndtr(mu / 2 - epsilon / mu))
        return float(first - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)))

    low, high = 0.0, 5000.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("times", [1, 10, 300])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_without_sampling_it_is_just_above_the_exact_bound(
    sigma: float, times: int, delta: float
) -> None:
    exact = exact_gaussian(sigma, times, delta)
    found = spent({(sigma, 1.0): times}, delta).epsilon
    assert exact <= found <= 1.2 * exact + 0.02


def by_integral(sigma: float, rate: float, order: float) -> float:
    """Return the Rényi divergence of (1-q) N(0, σ²) + q N(1, σ²) from N(0, σ²), on a fine grid."""
    z = np.linspace(-40 * sigma - 5, 40 * sigma + order + 5, 200_001)
    shifted = (2 * z - 1) / (2 * sigma**2)
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + shifted)
    logs = -(z**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi)) + order * ratio
    top = logs.max()
    return float((top + math.log(np.trapezoid(np.exp(logs - top), z))) / (order - 1))


@pytest.mark.parametrize("sigma", [0.4, 1.0, 5.0])
@pytest.mark.parametrize("rate", [0.01, 0.4, 0.99])
def test_with_sampling_each_order_is_the_integral(sigma: float, rate: float) -> None:
    for order in (1.1, 2.0, 2.7, 10.9, 32, 128, 512):
        assert _at_order(sigma, rate, order) == pytest.approx(
            by_integral(sigma, rate, order), rel=1e-5
        )
    assert {1.1, 2.0, 10.9, 32, 128, 512} <= set(_ORDERS)


def test_it_is_what_opacus_accountant_says() -> None:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    mechanisms = {(1.0, 0.25): 8, (1.3, 0.1): 30}
    for (sigma, rate), times in mechanisms.items():
        for _ in range(times):
            accountant.step(noise_multiplier=sigma, sample_rate=rate)
    theirs = accountant.get_epsilon(delta=1e-5)
    assert spent(mechanisms, 1e-5).epsilon == pytest.approx(theirs, rel=1e-3)
    assert spent(mechanisms, 1e-5).epsilon <= theirs


def test_more_noise_or_fewer_rows_or_steps_spend_less() -> None:
    base = spent({(1.0, 0.1): 100}, 1e-5).epsilon
    for less in ({(1.2, 0.1): 100}, {(1.0, 0.08): 100}, {(1.0, 0.1): 90}):
        assert spent(less, 1e-5).epsilon < base
    assert spent({(1.0, 0.1): 100}, 1e-3).epsilon < base


@pytest.mark.parametrize("sigma", [1e-12, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("rate", [1e-9, 0.3, 0.999999, 1.0])
def test_extremes_are_numbers(sigma: float, rate: float) -> None:
    with np.errstate(all="raise"):
        found = spent({(sigma, rate): 3}, 1e-5).epsilon
    assert found >= 0
    assert not math.isnan(found)


def test_nothing_done_is_nothing_spent() -> None:
    assert spent({}, 1e-5) == Spent(0.0, 1e-5)
    assert spent({(1.0, 0.5): 0}, 1e-5) == Spent(0.0, 1e-5)


def test_rows_compose_over_all_of_a_clients_turns_and_no_other() -> None:
    turn = noted(1.1, 50, 5, 4)
    turns = [("a", turn), ("b", noted(1.1, 20, 5, 4)), ("a", turn), ("a", noted(1.1, 50, 5, 7))]
    found = spent_by_client(turns, PrivacyOptions(record_level=RECORD), ["a", "b", "c"])
    assert found == {
        "a": ClientSpent(spent({(1.1, 0.1): 15}, 1e-5)),
        "b": ClientSpent(spent({(1.1, 0.25): 4}, 1e-5)),
        "c": ClientSpent(Spent(0.0, 1e-5)),
    }
    assert found["a"].record_level.epsilon > 0.5  # type: ignore[union-attr]


def test_clients_compose_over_the_rounds_they_took_part_in() -> None:
    turns: list[tuple[str, dict[str, float]]] = [("a", {}), ("b", {}), ("a", {})]
    found = spent_by_client(turns, PrivacyOptions(client_level=CLIENT), ["a", "b", "c"])
    assert found == {
        "a": ClientSpent(None, spent({(4.0, 1.0): 2}, 1e-3)),
        "b": ClientSpent(None, spent({(4.0, 1.0): 1}, 1e-3)),
        "c": ClientSpent(None, Spent(0.0, 1e-3)),
    }
    both = PrivacyOptions(record_level=RECORD, client_level=CLIENT)
    assert spent_by_client([("a", noted(1.1, 9, 3, 1))], both, "a")["a"] == ClientSpent(
        spent({(1.1, 1 / 3): 1}, 1e-5), spent({(4.0, 1.0): 1}, 1e-3)
    )
    assert spent_by_client(turns, PrivacyOptions(), "ab") == {"a": NO_LEVER, "b": NO_LEVER}


def test_without_a_lever_no_turn_is_read() -> None:
    def turns() -> Iterator[tuple[str, dict[str, float]]]:
        pytest.fail("there may be as many as clients times rounds")
        yield "a", {}

    assert spent_by_client(turns(), PrivacyOptions(), "a") == {"a": NO_LEVER}


def test_a_turn_that_notes_no_noise_has_no_bound() -> None:
    """It is never taken for a private one: not even among others that were."""
    turns: list[tuple[str, dict[str, float]]] = [("a", noted(1.1, 50, 5, 4)), ("a", {"x": 1.0})]
    found = spent_by_client(turns, PrivacyOptions(record_level=RECORD), "a")
    assert found["a"].record_level == Spent(math.inf, 1e-5)


def test_a_step_of_more_rows_than_there_are_takes_them_all() -> None:
    assert noted(1.0, 5, 8, 2) == {
        "dp_noise_multiplier": 1.0,
        "dp_sample_rate": 1.0,
        "dp_steps": 2.0,
    }
    assert noted(1.0, 32, 8, 2)["dp_sample_rate"] == 0.25


def test_the_largest_of_each_lever() -> None:
    few, many = Spent(1.0, 0.1), Spent(2.0, 0.1)
    assert largest({"a": ClientSpent(few, many), "b": ClientSpent(many, few)}) == ClientSpent(
        many, many
    )
    assert largest({"a": NO_LEVER}) == largest({}) == NO_LEVER


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [
        (0.0, "ε = 0.0000"),
        (0.00921, "ε = 0.0093"),
        (0.1, "ε = 0.10"),
        (3.0808, "ε = 3.09"),
        (123.2, "ε = 124"),
        (10_000, "ε above 10000"),
        (math.inf, "ε above 10000"),
    ],
)
def test_it_is_told_rounded_up(epsilon: float, text: str) -> None:
    assert said(Spent(epsilon, 1e-5)) == f"{text} at δ = 1e-05"

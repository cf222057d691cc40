"""The interval of a paired difference, against enumeration, closed forms and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.evaluate.bootstrap import (
    LEAST_CLIENTS,
    Interval,
    paired_interval,
    resampled_means,
    student_quantile,
    tail_for,
)

TABLE = np.array([[0.3, -1.0, 0.1], [0.5, -0.2, -0.4]])


def every_resample(table: np.ndarray) -> np.ndarray:
    """Return the mean of every way to draw seeds and clients, each as likely as any other."""
    n_seeds, n_clients = table.shape
    return np.array(
        [
            np.mean([[table[s, c] for c in clients] for s in seeds])
            for seeds in itertools.product(range(n_seeds), repeat=n_seeds)
            for clients in itertools.product(range(n_clients), repeat=n_clients)
        ]
    )


def test_resampled_means_are_distributed_as_all_resamples_are() -> None:
    exact = every_resample(TABLE)
    drawn = resampled_means(TABLE, 200_000, seed=1)
    assert len(exact) == 2**2 * 3**3
    assert drawn.mean() == pytest.approx(exact.mean(), abs=3e-3)
    assert drawn.std() == pytest.approx(exact.std(), rel=1e-2)
    for point in np.quantile(exact, (0.1, 0.3, 0.5, 0.7, 0.9)) + 1e-9:
        assert np.mean(drawn <= point) == pytest.approx(np.mean(exact <= point), abs=6e-3)


def test_clients_and_seeds_are_both_drawn() -> None:
    """Where only one of them differs, the variance is that of a mean of so many draws of it."""
    clients = np.array([[1.0, 2.0, 4.0, 9.0]]).repeat(3, axis=0)
    seeds = clients[:, :3].T
    by_client = resampled_means(clients, 100_000, seed=0)
    by_seed = resampled_means(seeds, 100_000, seed=0)
    assert by_client.var() == pytest.approx(clients[0].var() / 4, rel=0.02)
    assert by_seed.var() == pytest.approx(seeds[:, 0].var() / 3, rel=0.02)


def test_draws_in_parts_are_as_many_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfl_lm.evaluate.bootstrap._AT_ONCE", 35)
    drawn = resampled_means(TABLE, 1003, seed=4)
    assert drawn.shape == (1003,)
    assert set(drawn.round(9)) <= set(every_resample(TABLE).round(9))


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042)],
)
def test_students_quantile_is_the_one_of_the_tables(degrees: int, quantile: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-4)


def test_students_quantile_tends_to_the_normal_one() -> None:
    assert student_quantile(0.975, 4000) == pytest.approx(1.95996, abs=1e-3)
    assert student_quantile(0.5, 7) == pytest.approx(0, abs=1e-9)
    assert student_quantile(0.75, 1) == pytest.approx(1)  # Cauchy: tan(π/4)


def test_tails_are_thinner_for_few_clients() -> None:
    by_hand = 0.5 * math.erfc(math.sqrt(6 / 5) * 2.5706 / math.sqrt(2))
    assert tail_for(6, 0.95) == pytest.approx(by_hand, rel=1e-3)
    assert tail_for(6, 0.95) < tail_for(12, 0.95) < tail_for(1000, 0.95) < 0.025
    assert tail_for(4000, 0.95) == pytest.approx(0.025, abs=1e-4)


def test_an_interval_is_made_of_the_tails_of_the_resampled_means() -> None:
    table = np.random.default_rng(3).normal(size=(3, 8))
    tail = tail_for(8, 0.95)
    low, high = np.quantile(resampled_means(table, 10_000, 0), (tail, 1 - tail))
    assert paired_interval(table) == Interval(pytest.approx(table.mean()), low, high)
    assert paired_interval(table) == paired_interval(table)
    assert paired_interval(table, seed=1) != paired_interval(table)
    narrower = paired_interval(table, level=0.8)
    assert low < narrower.low < narrower.high < high


def test_an_interval_follows_a_shift_a_scale_and_a_change_of_sides() -> None:
    table = np.random.default_rng(5).normal(size=(2, 7))
    plain, moved, turned = (paired_interval(t) for t in (table, 2 * table + 5, -table))
    for name in ("estimate", "low", "high"):
        assert getattr(moved, name) == pytest.approx(2 * getattr(plain, name) + 5)
    assert (turned.low, turned.high) == pytest.approx((-plain.high, -plain.low))


def test_no_interval_where_nothing_can_be_said() -> None:
    one = paired_interval(np.array([[0.5], [0.7]]))
    assert one.estimate == pytest.approx(0.6)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(paired_interval(np.zeros((0, 5))).estimate)
    equal = paired_interval(np.zeros((3, 9)))
    assert equal == Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize("table", [np.zeros(3), np.array([[0.0, math.nan]])])
def test_what_is_no_table_of_numbers_is_refused(table: np.ndarray) -> None:
    with pytest.raises(ValueError, match="table of finite numbers"):
        paired_interval(table)


def test_the_least_number_of_clients_is_the_one_whose_range_can_reach_the_level() -> None:
    """All on one side of the median: 2 · 2^-C."""
    assert 2 * 0.5**LEAST_CLIENTS <= 0.05 < 2 * 0.5 ** (LEAST_CLIENTS - 1)


@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_an_interval_lies_within_the_data(n_seeds: int, n_clients: int, seed: int) -> None:
    table = np.random.default_rng(seed).normal(size=(n_seeds, n_clients))
    found = paired_interval(table, resamples=200)
    assert table.min() - 1e-12 <= found.low <= found.high <= table.max() + 1e-12


def coverage(n_clients: int, n_seeds: int, *, clients: float, seeds: float, rest: float) -> float:
    """Return how often the interval holds the true mean, 0, over 1,000 worlds made by chance."""
    draw = np.random.default_rng(n_clients + 100 * n_seeds)
    held = 0
    for world in range(1000):
        table = (
            draw.normal(0, clients, n_clients)
            + draw.normal(0, seeds, (n_seeds, 1))
            + draw.normal(0, rest, (n_seeds, n_clients))
        )
        found = paired_interval(table, resamples=2000, seed=world)
        held += found.low <= 0 <= found.high
    return held / 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_clients", "n_seeds", "clients", "seeds", "rest", "least", "most"),
    [
        # what differs is above all the clients: as it is here, and the level holds
        (6, 3, 1.0, 0.1, 0.5, 0.93, 1.0),
        (12, 3, 1.0, 0.1, 0.5, 0.93, 0.99),
        (30, 3, 1.0, 0.1, 0.5, 0.93, 0.99),
        (100, 3, 1.0, 0.1, 0.5, 0.90, 0.98),
        # one seed knows nothing of other seeds
        (6, 1, 1.0, 0.0, 0.5, 0.92, 0.97),
        (6, 1, 1.0, 1.0, 0.5, 0.50, 0.85),
        # seeds that differ as much as clients: three of them are too few, ten nearly do
        (30, 3, 1.0, 0.6, 1.0, 0.82, 0.93),
        (30, 10, 1.0, 0.6, 1.0, 0.91, 0.98),
    ],
)
def test_coverage(
    n_clients: int,
    n_seeds: int,
    clients: float,
    seeds: float,
    rest: float,
    least: float,
    most: float,
) -> None:
    found = coverage(n_clients, n_seeds, clients=clients, seeds=seeds, rest=rest)
    assert least <= found <= most

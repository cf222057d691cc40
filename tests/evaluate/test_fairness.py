"""Losses over clients in a few numbers, against numbers worked out by hand."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.evaluate.fairness import n_harmed, spread, win_share

NAN = math.nan


def test_five_clients_by_hand() -> None:
    found = spread(np.array([1.0, 2.0, 3.0, 4.0, 10.0]), np.array([4, 1, 1, 1, 1]))
    assert found.mean == 4.0
    assert found.weighted == (4 * 1 + 2 + 3 + 4 + 10) / 8
    assert found.worst == 10.0
    assert found.tail == pytest.approx(4 + 0.6 * 6)  # at 0.9 · 4 = 3.6 of the way along the order
    assert found.std == pytest.approx(math.sqrt((9 + 4 + 1 + 0 + 36) / 5))


@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=40))
def test_spread_against_the_standard_library(losses: list[float]) -> None:
    found = spread(np.array(losses), np.ones(len(losses)))
    assert found.mean == pytest.approx(statistics.fmean(losses))
    assert found.weighted == pytest.approx(found.mean)
    assert found.worst == max(losses)
    assert found.std == pytest.approx(statistics.pstdev(losses), abs=1e-9)
    assert sum(loss >= found.tail - 1e-9 for loss in losses) >= len(losses) / 10
    if len(losses) > 1:
        deciles = statistics.quantiles(losses, n=10, method="inclusive")
        assert found.tail == pytest.approx(deciles[-1])


def test_a_client_is_harmed_if_its_loss_is_higher_and_only_then() -> None:
    assert n_harmed(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.5, 2.9])) == 1


def test_wins_are_counted_over_pairs_of_seed_and_client() -> None:
    one = np.array([[1.0, 2.0], [3.0, 4.0]])
    other = np.array([[1.5, 2.0], [2.0, 5.0]])
    assert win_share(one, other) == 2 / 4
    assert win_share(other, one) == 1 / 4  # and one tie
    assert win_share(one, one) == 0


def test_who_has_diverged_loses_to_who_has_not() -> None:
    gone = np.array([[NAN, NAN], [1.0, 1.0]])
    there = np.array([[5.0, 5.0], [2.0, 0.5]])
    assert win_share(there, gone) == 3 / 4
    assert win_share(gone, there) == 1 / 4
    assert win_share(gone[:1], gone[:1]) == 0
    assert math.isnan(win_share(gone[:0], gone[:0]))

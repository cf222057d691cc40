"""Who takes part in a round."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.federation.cohort import cohort, round_half_up

IDS = [f"client_{i}" for i in range(10)]


@pytest.mark.parametrize(
    ("n", "fraction", "size"),
    [
        *((10, 1.0, 10), (10, 0.5, 5), (10, 0.04, 1), (10, 0.05, 1), (10, 0.25, 3)),
        *((3, 0.5, 2), (1, 0.1, 1), (5, 0.5, 3), (10, 0.94, 9), (10, 0.95, 10)),
    ],
)
def test_a_fraction_of_the_clients_rounded_half_up_and_at_least_one(
    n: int, fraction: float, size: int
) -> None:
    assert len(cohort(IDS[:n], fraction, seed=0, round=1)) == size


def test_halves_go_up() -> None:
    assert [round_half_up(x) for x in (0.4, 0.5, 1.5, 2.5, 2.51)] == [0, 1, 2, 3, 3]


@given(
    st.lists(st.text(), min_size=1, max_size=20, unique=True),
    st.floats(0.01, 1.0),
    st.integers(0, 2**63 - 1),
    st.integers(1, 1000),
)
def test_a_cohort_is_sorted_drawn_without_replacement_and_blind_to_order(
    ids: list[str], fraction: float, seed: int, round: int
) -> None:
    chosen = cohort(ids, fraction, seed=seed, round=round)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(ids)
    assert chosen == cohort(ids[::-1], fraction, seed=seed, round=round)


def test_the_draw_depends_on_the_seed_and_the_round() -> None:
    def draw(seed: int, round: int) -> tuple[str, ...]:
        return tuple(cohort(IDS, 0.3, seed=seed, round=round))

    assert len({draw(0, round) for round in range(1, 31)}) > 15
    assert len({draw(seed, 1) for seed in range(30)}) > 15
    assert draw(4, 9) == draw(4, 9)


def test_over_many_rounds_everyone_takes_part_alike() -> None:
    counts = Counter(c for round in range(1000) for c in cohort(IDS, 0.3, seed=5, round=round))
    # 1000 draws of 3 out of 10: a mean of 300 with a standard deviation of 14.5.
    assert counts.keys() == set(IDS)
    assert all(240 < count < 360 for count in counts.values())

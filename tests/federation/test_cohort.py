"""Who takes part in a round."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.errors import RecipeError
from pfl_lm.federation.availability import Trace
from pfl_lm.federation.cohort import Cohorts, cohort, refuse_small_rounds
from pfl_lm.recipe.sections import FederationOptions
from tests.recipe.minimal import load

IDS = [f"client_{i}" for i in range(10)]
BY_EXAMPLES = {"clients_per_round": 2, "sampling": "examples"}


def options(**keys: Any) -> FederationOptions:
    return FederationOptions.model_validate({"rounds": 3} | keys)


def draw(
    clients: Mapping[str, int] | list[str],
    *,
    seed: int = 0,
    round: int = 1,
    trace: Trace | None = None,
    **keys: Any,
) -> list[str]:
    """Draw a cohort; clients without numbers have one train row each."""
    n_train = clients if isinstance(clients, Mapping) else dict.fromkeys(clients, 1)
    return cohort(options(**keys), n_train, trace, seed=seed, round=round)


@pytest.mark.parametrize(
    ("n", "fraction", "size"),
    [
        *((10, 1.0, 10), (10, 0.5, 5), (10, 0.04, 1), (10, 0.05, 1), (10, 0.25, 3)),
        *((3, 0.5, 2), (1, 0.1, 1), (5, 0.5, 3), (10, 0.94, 9), (10, 0.95, 10)),
        *((1, 0.5, 1), (6, 0.25, 2), (10, 1e-9, 1)),
    ],
)
def test_a_fraction_of_the_clients_rounded_half_up_and_at_least_one(
    n: int, fraction: float, size: int
) -> None:
    assert len(draw(IDS[:n], fraction_train=fraction)) == size


def test_a_number_of_clients() -> None:
    for n in range(1, 11):
        assert len(draw(IDS, clients_per_round=n)) == n


@pytest.mark.parametrize(
    ("seed", "fraction", "round", "chosen"),
    [
        (0, 0.3, 1, "057"),
        (0, 0.3, 2, "246"),
        (5, 0.3, 7, "259"),
        (2**63 - 1, 0.5, 1000, "01347"),
        (4, 0.94, 3, "012346789"),
        (0, 0.04, 1, "5"),
    ],
)
def test_a_draw_never_changes(seed: int, fraction: float, round: int, chosen: str) -> None:
    """These are the cohorts of the first version; a number instead of a share draws the same."""
    wanted = [f"client_{i}" for i in chosen]
    assert draw(IDS, fraction_train=fraction, seed=seed, round=round) == wanted
    assert draw(IDS, clients_per_round=len(chosen), seed=seed, round=round) == wanted


def test_the_draws_of_many_rounds_never_change() -> None:
    many = [f"c{i:04d}" for i in range(1000)]
    drawn = [draw(many, fraction_train=0.1, seed=3, round=round) for round in range(1, 51)]
    assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest() == (
        "b3366f4d39f5082a4a2fa715a4cd5bd0b0660c037dcc290efc534defaae7e995"
    )
    odd = ["Zoë", "a", "b", "007", "A/.."]
    assert [draw(odd, fraction_train=0.5, seed=11, round=round) for round in (1, 2, 3)] == [
        ["Zoë", "a", "b"],
        ["007", "A/..", "b"],
        ["A/..", "Zoë", "b"],
    ]


def test_a_draw_by_examples_never_changes() -> None:
    rows = {client: 1 + 7 * i for i, client in enumerate(IDS)}
    keys = {"sampling": "examples", "clients_per_round": 3}
    drawn = [draw(rows, seed=1, round=round, **keys) for round in (1, 2, 3)]
    assert ["".join(client[-1] for client in each) for each in drawn] == ["458", "678", "259"]


@given(
    st.dictionaries(st.text(), st.integers(1, 10**6), min_size=1, max_size=20),
    st.one_of(
        st.fixed_dictionaries({"fraction_train": st.floats(0.01, 1.0)}),
        st.fixed_dictionaries({"clients_per_round": st.integers(1, 20)}),
    ),
    st.sampled_from(["uniform", "examples"]),
    st.integers(0, 2**63 - 1),
    st.integers(1, 1000),
)
def test_a_cohort_is_sorted_drawn_without_replacement_and_blind_to_order(
    rows: dict[str, int], size: dict[str, Any], sampling: str, seed: int, round: int
) -> None:
    keys = {"seed": seed, "round": round, "sampling": sampling, **size}
    chosen = draw(rows, **keys)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(rows)
    assert len(chosen) == options(**size).cohort_size(len(rows))
    assert chosen == draw(dict(reversed(rows.items())), **keys)


@pytest.mark.parametrize("sampling", ["uniform", "examples"])
def test_the_draw_depends_on_the_seed_and_the_round(sampling: str) -> None:
    def drawn(seed: int, round: int) -> tuple[str, ...]:
        return tuple(draw(IDS, fraction_train=0.3, sampling=sampling, seed=seed, round=round))

    assert len({drawn(0, round) for round in range(1, 31)}) > 15
    assert len({drawn(seed, 1) for seed in range(30)}) > 15
    assert drawn(4, 9) == drawn(4, 9)


def test_over_many_rounds_everyone_takes_part_alike() -> None:
    counts = Counter(
        client for round in range(1000) for client in draw(IDS, clients_per_round=3, round=round)
    )
    # 1000 draws of 3 out of 10: a mean of 300 with a standard deviation of 14.5.
    assert counts.keys() == set(IDS)
    assert all(240 < count < 360 for count in counts.values())


def exact(rows: Mapping[str, int], size: int) -> dict[tuple[str, ...], float]:
    """Return the probability of every cohort, summed over the orders in which it may be drawn."""
    found: Counter[tuple[str, ...]] = Counter()
    for order in itertools.permutations(rows, size):
        probability, left = 1.0, sum(rows.values())
        for client in order:
            probability *= rows[client] / left
            left -= rows[client]
        found[tuple(sorted(order))] += probability
    return dict(found)


def test_the_exact_probabilities_by_hand() -> None:
    """Of a: 1, b: 2, c: 3 rows two are drawn; a and b are with 1/6 · 2/5 + 2/6 · 1/4 = 3/20."""
    found = exact({"a": 1, "b": 2, "c": 3}, 2)
    assert found == pytest.approx({("a", "b"): 9 / 60, ("a", "c"): 16 / 60, ("b", "c"): 35 / 60})
    assert sum(exact({"a": 1, "b": 20, "c": 300, "d": 5}, 3).values()) == pytest.approx(1)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "rows",
    [{"a": 1, "b": 2, "c": 3, "d": 10}, {"a": 5, "b": 5, "c": 5, "d": 5}, {"d": 1, "b": 9, "a": 9}],
    ids=["uneven", "even", "three"],
)
def test_cohorts_by_examples_come_as_often_as_they_should(rows: dict[str, int], size: int) -> None:
    rounds = 6000
    keys = {"sampling": "examples", "clients_per_round": size}
    counts = Counter(tuple(draw(rows, seed=2, round=n, **keys)) for n in range(1, rounds + 1))
    wanted = exact(rows, size)
    assert counts.keys() <= wanted.keys()
    for chosen, probability in wanted.items():
        mean, deviation = rounds * probability, (rounds * probability * (1 - probability)) ** 0.5
        assert abs(counts[chosen] - mean) <= 4 * deviation, (chosen, counts[chosen], mean)
    for client in rows:
        inclusion = sum(p for chosen, p in wanted.items() if client in chosen)
        often = sum(count for chosen, count in counts.items() if client in chosen)
        deviation = (rounds * max(inclusion * (1 - inclusion), 0)) ** 0.5
        assert abs(often - rounds * inclusion) <= 4 * deviation + 1e-6


def test_rows_count_only_if_they_are_asked_for() -> None:
    few, many = dict.fromkeys(IDS, 1), {client: 10**i for i, client in enumerate(IDS)}
    assert draw(few, clients_per_round=3) == draw(many, clients_per_round=3)
    always = [draw(many, round=n, **BY_EXAMPLES) for n in range(1, 101)]
    assert sum("client_9" in chosen for chosen in always) > 95


def test_whoever_can_be_reached_and_nobody_else() -> None:
    trace = Trace((("a", "b", "c"), ("d",), ("b", "e")))
    rows = dict.fromkeys("abcdef", 4)
    everybody = [draw(rows, trace=trace, round=round) for round in range(1, 8)]
    assert everybody[:3] == [["a", "b", "c"], ["d"], ["b", "e"]]
    assert everybody[3:] == [*everybody[:3], everybody[0]]  # it starts again
    for sampling in ("uniform", "examples"):
        two = [
            draw(rows, trace=trace, round=round, clients_per_round=2, sampling=sampling)
            for round in range(1, 301)
        ]
        assert Counter(map(len, two)) == {2: 200, 1: 100}
        assert {tuple(chosen) for chosen in two[::3]} == {("a", "b"), ("a", "c"), ("b", "c")}
        assert {tuple(chosen) for chosen in two[1::3]} == {("d",)}


def test_a_share_is_of_those_who_can_be_reached() -> None:
    trace = Trace((tuple("abcd"), tuple("ab"), tuple("a")))
    rows = dict.fromkeys("abcdefghij", 1)
    sizes = [len(draw(rows, trace=trace, round=n, fraction_train=0.5)) for n in (1, 2, 3)]
    assert sizes == [2, 1, 1]


def test_who_is_away_has_no_part_in_the_draw() -> None:
    """Only the clients of the round matter, not who else there is or how many rows they have."""
    trace = Trace((tuple("abcd"),))
    some, more = dict.fromkeys("abcd", 3), dict.fromkeys("abcdef", 3) | {"e": 1000}
    for sampling in ("uniform", "examples"):
        keys = {"clients_per_round": 2, "sampling": sampling}
        assert draw(some, **keys) == draw(more, trace=trace, **keys)


def test_a_thousand_clients_are_drawn_at_once() -> None:
    many = {f"client {i}": 1 + i % 97 for i in range(1000)}
    began = time.perf_counter()
    for round in range(1, 11):
        assert len(draw(many, round=round, fraction_train=0.5, sampling="examples")) == 500
    assert time.perf_counter() - began < 1  # some 0.01 s


def test_the_cohorts_of_a_recipe(tmp_path: Path) -> None:
    rows = dict.fromkeys(IDS, 1)

    def cohorts(*overrides: str) -> list[list[str]]:
        keys = ("federation.rounds=20", "federation.clients_per_round=3", *overrides)
        return Cohorts.of(load(tmp_path, *keys).recipe, rows).all()

    plain = cohorts("seed=7")
    assert len(plain) == 20
    assert plain == [draw(IDS, clients_per_round=3, seed=7, round=n) for n in range(1, 21)]
    assert plain == cohorts("seed=8", "federation.seed=7")
    assert plain != cohorts("seed=7", "federation.seed=0")
    assert cohorts("seed=0") == cohorts("seed=7", "federation.seed=0")


def test_the_cohorts_of_a_recipe_keep_to_its_trace(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("round,client\n1,client_3\n2,client_4\n2,client_1\n")
    recipe = load(tmp_path, f"federation.availability={tmp_path}/trace.csv").recipe
    cohorts = Cohorts.of(recipe, dict.fromkeys(IDS, 1))
    assert cohorts.all() == [["client_3"], ["client_1", "client_4"]]
    assert cohorts(3) == ["client_3"]


TRACE = Trace((tuple("abcd"), tuple("ab"), tuple("a")))
SMALL = [
    (
        {"clients_per_round": 7},
        None,
        "federation.clients_per_round: must be at most the number of clients, got 7 and there "
        "are 6 clients\n  hint: federation.clients_per_round=6 is everybody",
    ),
    (
        {"min_clients": 7},
        None,
        "federation.min_clients: round 1 would have 6 of the 6 that there are, and needs 7\n"
        "  hint: lower federation.min_clients",
    ),
    (
        {"min_clients": 3, "fraction_train": 0.4},
        None,
        "federation.min_clients: round 1 would have 2 of the 6 that there are, and needs 3\n"
        "  hint: lower federation.min_clients, or raise federation.fraction_train (0.4)",
    ),
    (
        {"min_clients": 2},
        TRACE,
        "federation.min_clients: round 3 would have 1 of the 1 that can be reached then, and "
        "needs 2\n  hint: lower federation.min_clients, or name more clients of round 3 in t.csv",
    ),
    (
        {"min_clients": 2, "fraction_train": 0.5},
        TRACE,
        "federation.min_clients: round 2 would have 1 of the 2 that can be reached then, and "
        "needs 2\n  hint: lower federation.min_clients, or raise federation.fraction_train (0.5)",
    ),
]


@pytest.mark.parametrize(("keys", "trace", "said"), SMALL)
def test_the_first_round_that_can_never_be_is_named(
    keys: dict[str, Any], trace: Trace | None, said: str
) -> None:
    path = {} if trace is None else {"availability": "t.csv"}
    with pytest.raises(RecipeError) as caught:
        refuse_small_rounds(options(**keys, **path), 6, trace)
    assert str(caught.value) == said


def test_one_client_is_one_client() -> None:
    with pytest.raises(RecipeError, match="got 2 and there is 1 client\n"):
        refuse_small_rounds(options(clients_per_round=2), 1, None)


def test_rounds_that_are_large_enough_are_fine() -> None:
    refuse_small_rounds(options(min_clients=6), 6, None)
    refuse_small_rounds(options(clients_per_round=6, min_clients=6), 6, None)
    refuse_small_rounds(options(min_clients=3, fraction_train=0.42), 6, None)
    refuse_small_rounds(options(clients_per_round=3), 6, TRACE)
    # Rounds of the trace to which the run does not come do not matter.
    refuse_small_rounds(options(rounds=2, min_clients=2), 6, TRACE)

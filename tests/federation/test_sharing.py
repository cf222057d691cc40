from __future__ import annotations

import pytest

from pfl_lm.federation.sharing import Sharing, planned, sharing


@pytest.mark.parametrize(
    ("n_ranks", "cohorts", "way", "why"),
    [
        (2, [6, 6], "clients", "a round has 6 clients, enough for all"),
        (6, [6, 6], "clients", "a round has 6 clients, enough for all"),
        (8, [6, 6], "data", "a round has 6 clients, fewer than ranks"),
        (2, [1], "data", "a round has 1 client, fewer than ranks"),
        (4, [1, 5, 6], "clients", "a round has 5 clients, enough for all"),  # most rounds
    ],
)
def test_auto_lets_ranks_share_turns_where_some_would_stand_by(
    n_ranks: int, cohorts: list[int], way: str, why: str
) -> None:
    found = sharing("auto", n_ranks, cohorts)
    what = {"clients": "take clients of their own", "data": "share each client's turn"}[way]
    assert found.way == way
    assert found.why == f"{n_ranks} ranks {what} (runtime.parallel: auto): {why}"


def test_one_process_shares_nothing_and_says_nothing() -> None:
    assert sharing("auto", 1, []) == Sharing("clients", 1)
    assert sharing("auto", 1, [], "data on 2 ranks").noted == "clients"


def test_the_recipe_decides() -> None:
    assert sharing("data", 2, [9]).why == (
        "2 ranks share each client's turn (runtime.parallel: data): as the recipe says"
    )
    assert sharing("clients", 2, [1], "data on 2 ranks").way == "clients"


@pytest.mark.parametrize(("begun", "way"), [("clients", "clients"), ("data on 4 ranks", "data")])
def test_a_run_that_is_gone_on_with_keeps_to_what_it_began(begun: str, way: str) -> None:
    for cohorts in ([1], [9]):
        found = sharing("auto", 2, cohorts, begun)
        assert (found.way, found.why.rpartition(": ")[2]) == (way, "as this run has begun")


def test_what_a_run_notes_is_alike_where_its_bytes_are() -> None:
    assert {sharing("auto", n, [9, 9]).noted for n in (1, 2, 9)} == {"clients"}
    assert [sharing("data", n, [9]).noted for n in (2, 4)] == ["data on 2 ranks", "data on 4 ranks"]


def test_a_plan_says_it_for_any_number() -> None:
    both = "up to 6 ranks would take clients of their own, more than 6 ranks would share each"
    assert planned("auto", 1, [6, 6]) == f"{both} client's turn"
    assert planned("auto", 1, [1]) == "2 ranks or more would share each client's turn"
    assert planned("auto", 8, [6]) == sharing("auto", 8, [6]).why
    assert planned("data", 1, [6]) == (
        "this is one process, and runtime.parallel: data needs several"
    )


def test_ranks_that_cannot_share_rows_take_clients_however_few_there_are() -> None:
    found = sharing("auto", 4, [1, 1, 1], rows=False)
    assert (found.way, found.n_ranks) == ("clients", 4)
    assert found.why.endswith("rows are shared for causal_lm only")
    assert planned("auto", 1, [3], rows=False) == "up to 3 ranks would take clients of their own"

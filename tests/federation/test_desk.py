"""Tasks handed out to whoever is free, and outcomes that leave in the order of the tasks."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch

from pfl_lm.errors import DataError, LostRankError
from pfl_lm.federation.fleet.desk import Desk, Handed
from pfl_lm.federation.messages import Assignment, Update
from pfl_lm.methods import Broadcast


def task(client: str) -> Assignment:
    sent = Broadcast({"global_weights": torch.zeros(1)})
    return Assignment("tiny", 1, client, "train", sent, None, 1, 0)


def update(client: str) -> Update:
    return Update(run="tiny", round=1, client=client)


def desk_with(n_ranks: int, *works: float, **had: int) -> Desk:
    desk = Desk(n_ranks, {client.removeprefix("c"): rank for client, rank in had.items()})
    for i, work in enumerate(works):
        desk.bring(task(str(i)), work)
    return desk


def took(handed: Handed | None) -> int:
    assert handed is not None
    return handed.number


def test_the_first_tasks_are_each_ranks_own_and_then_who_is_free_takes_the_next() -> None:
    desk = desk_with(3, *[1.0] * 6)
    desk.deal()
    assert took(desk.take(2)) == 2
    assert [took(desk.take(0)), took(desk.take(0)), took(desk.wait_for(2))] == [0, 3, 4]
    assert took(desk.take(1)) == 1
    assert took(desk.take(1)) == 5
    assert desk.take(0) is None


def test_a_rank_is_given_a_client_it_has_had_if_that_is_next_in_line() -> None:
    desk = desk_with(2, *[1.0] * 6, c0=1, c3=0, c5=1)
    desk.deal()
    assert [took(desk.take(0)), took(desk.take(1))] == [1, 0]
    assert took(desk.take(0)) == 3  # 2 and 3 are next
    assert took(desk.take(1)) == 2  # 5 would be its own, and is not next
    assert [took(desk.take(1)), took(desk.take(0))] == [5, 4]


def test_two_clients_of_one_rank_begin_on_two() -> None:
    desk = desk_with(3, *[1.0] * 3, c1=2, c2=2)
    desk.deal()
    assert [took(desk.take(rank)) for rank in range(3)] == [2, 0, 1]


def test_outcomes_leave_in_the_order_of_the_tasks() -> None:
    desk = desk_with(2, 1.0, 1.0, 1.0)
    first, second = desk.take(0), desk.take(1)
    third = desk.take(1)
    assert first is not None and second is not None and third is not None  # noqa: PT018
    desk.answer(1, second, update("1"))
    desk.answer(1, third, update("2"))
    assert desk.collect(wait=False) is None
    desk.answer(0, first, update("0"))
    assert [desk.collect(wait=True) for _ in range(4)] == [
        (0, update("0")),
        (1, update("1")),
        (1, update("2")),
        None,
    ]


def test_it_is_full_when_others_have_enough_beside_the_longest() -> None:
    assert not desk_with(2, 5.0).is_full
    assert not desk_with(2, 5.0, 4.0, 1.0).is_full  # 10 of 15
    assert desk_with(2, 5.0, 5.0, 5.0).is_full
    assert not desk_with(2, 1.0, 1.0).is_full  # nothing beyond one for each
    assert desk_with(2, 9.0, *[1.0] * 18).is_full
    assert not desk_with(2, 9.0, *[1.0] * 17).is_full


def test_after_a_failure_nothing_more_begins_and_it_is_told_at_once() -> None:
    desk = desk_with(2, *[1.0] * 5)
    first, second = desk.take(0), desk.take(1)
    assert first is not None and second is not None  # noqa: PT018
    error = DataError("no")
    desk.answer(1, second, error)
    assert (desk.take(0), desk.wait_for(1)) == (None, None)
    assert desk.collect(wait=True) == (1, error)  # although task 0 is still out
    desk.answer(0, first, update("0"))
    assert desk.collect(wait=True) == (0, update("0"))
    assert desk.is_full  # no more are asked for


def test_a_lost_rank_is_told_where_outcomes_are_waited_for() -> None:
    desk = desk_with(2, 1.0, 1.0)
    desk.take(1)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            desk.collect(wait=True)
        except LostRankError as error:
            raised.append(error)

    waiting = Thread(target=wait)
    waiting.start()
    desk.break_off(LostRankError("gone"))
    waiting.join(timeout=10)
    assert [str(error) for error in raised] == ["gone"]


def test_who_waits_for_a_task_is_let_go() -> None:
    desk = desk_with(2)
    got: list[Any] = [0]
    waiting = Thread(target=lambda: got.append(desk.wait_for(1)))
    waiting.start()
    desk.close()
    waiting.join(timeout=10)
    assert got == [0, None]


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_is_waited_for_when_nothing_is_out(n: int) -> None:
    desk = desk_with(2, *[1.0] * n)
    for _ in range(n):
        handed = desk.take(0)
        assert handed is not None
        desk.answer(0, handed, update("0"))
        assert desk.collect(wait=True) is not None
    assert desk.collect(wait=True) is None

"""Where tasks wait for a free rank, and what came of them for its turn to be counted.

Tasks are handed out in their order, each to whoever is free first; outcomes leave in that order
too, whichever rank is faster, so that nothing that is written depends on how fast ranks are. A rank
that has had a client before still remembers its rows, so of the tasks that are next in line it is
given that client's.
"""

from __future__ import annotations

from threading import Condition
from typing import NamedTuple

from pfl_lm.errors import PflError
from pfl_lm.federation.messages import Assignment, Update

Outcome = Update | PflError | str
"""What came of a task: an update, what a person can mend, or a traceback."""


class Handed(NamedTuple):
    """A task, its number, and how much work it is expected to be."""

    number: int
    task: Assignment
    work: float


class Desk:
    """Shared by rank 0, which brings tasks and takes outcomes, and those who attend to other ranks.

    Args:
        n_ranks: how many there are.
        had: which rank has had each client last; kept up to date.
    """

    def __init__(self, n_ranks: int, had: dict[str, int] | None = None) -> None:
        self._n_ranks = n_ranks
        self._had = {} if had is None else had
        self._changed = Condition()
        self._first: dict[int, Handed] = {}
        self._waiting: list[Handed] = []
        self._outcomes: dict[int, tuple[int, Outcome]] = {}
        self._brought = self._left = 0
        self._closed = False
        self._failed: tuple[int, Outcome] | None = None
        self._broken: BaseException | None = None

    @property
    def is_full(self) -> bool:
        """Whether there is enough for the others while rank 0 does the first task that waits."""
        with self._changed:
            works = [handed.work for handed in self._waiting]
            n = self._n_ranks
            return self._closed or (len(works) > n and sum(works) >= 1.5 * n * works[0])

    def bring(self, task: Assignment, work: float) -> None:
        """Put a task behind those that wait."""
        with self._changed:
            self._waiting.append(Handed(self._brought, task, work))
            self._brought += 1
            self._changed.notify_all()

    def deal(self) -> None:
        """Lay the first tasks out, one for each rank, so that chance does not say who begins."""
        with self._changed:
            first = self._waiting[: self._n_ranks]
            del self._waiting[: self._n_ranks]
            free = list(range(self._n_ranks))
            for handed in sorted(first, key=lambda each: each.task.client not in self._had):
                before = self._had.get(handed.task.client, 0)
                self._first[free.pop(free.index(before) if before in free else 0)] = handed

    def take(self, rank: int) -> Handed | None:
        """Return the next task for a rank; None if nothing waits."""
        with self._changed:
            return self._next(rank)

    def wait_for(self, rank: int) -> Handed | None:
        """Return the next task for a rank once there is one; None when the desk is closed."""
        with self._changed:
            while not self._closed:
                if (handed := self._next(rank)) is not None:
                    return handed
                self._changed.wait()
            return None

    def answer(self, rank: int, handed: Handed, outcome: Outcome) -> None:
        """Put down what came of a task that a rank had taken; after a failure no more begin."""
        with self._changed:
            self._outcomes[handed.number] = rank, outcome
            if not isinstance(outcome, Update):
                self._failed = self._failed or (rank, outcome)
                self._closed = True
            self._changed.notify_all()

    def collect(self, *, wait: bool) -> tuple[int, Outcome] | None:
        """Return the next outcome in the order of the tasks, with its rank; None if none is due.

        With ``wait`` it is waited for while tasks are out. A failure comes as soon as what is due
        before it has left, and what broke an attendant is raised.
        """
        with self._changed:
            while True:
                if self._left in self._outcomes:
                    self._left += 1
                    return self._outcomes.pop(self._left - 1)
                if self._failed is not None:
                    return self._failed
                if self._broken is not None:
                    raise self._broken
                if not wait or self._left == self._brought:
                    return None
                self._changed.wait()

    def break_off(self, error: BaseException) -> None:
        """Let rank 0 know that a rank cannot be reached."""
        with self._changed:
            self._broken = self._broken or error
            self._changed.notify_all()

    def close(self) -> None:
        """Hand out no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _next(self, rank: int) -> Handed | None:
        if self._closed:
            return None
        handed = self._first.pop(rank, None)
        if handed is None and self._waiting:
            near = self._waiting[: self._n_ranks]
            own = [each for each in near if self._had.get(each.task.client) == rank]
            handed = (own or near)[0]
            self._waiting.remove(handed)
        if handed is not None:
            self._had[handed.task.client] = rank
        return handed

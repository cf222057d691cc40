"""Where tasks wait for a free rank, and what came of them for its turn to be counted.

Tasks are handed out in their order, each to whoever is free first; outcomes leave in that order
too, whichever rank is faster, so that nothing that is written depends on how fast ranks are.
"""

from __future__ import annotations

from collections import deque
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

    The first task of each rank is the one of its own number, if there is one.
    """

    def __init__(self, n_ranks: int) -> None:
        self._changed = Condition()
        self._first: dict[int, Handed] = {}
        self._waiting: deque[Handed] = deque()
        self._outcomes: dict[int, tuple[int, Outcome]] = {}
        self._n_ranks = n_ranks
        self._brought = self._left = 0
        self._closed = False
        self._failed: tuple[int, Outcome] | None = None
        self._broken: BaseException | None = None

    @property
    def is_full(self) -> bool:
        """Whether there is enough for the others while rank 0 does the first task that waits."""
        with self._changed:
            waiting = [*self._first.values(), *self._waiting]
            works = [handed.work for handed in waiting]
            n = self._n_ranks
            return self._closed or (len(works) > n and sum(works) >= 1.5 * n * works[0])

    def bring(self, task: Assignment, work: float) -> None:
        """Put a task behind those that wait."""
        with self._changed:
            handed = Handed(self._brought, task, work)
            if handed.number < self._n_ranks:
                self._first[handed.number] = handed
            else:
                self._waiting.append(handed)
            self._brought += 1
            self._changed.notify_all()

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
        if rank in self._first:
            return self._first.pop(rank)
        return self._waiting.popleft() if self._waiting else None

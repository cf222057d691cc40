"""A fleet of one process: clients take their turns one after another on one backbone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.messages import Assignment, Update


class Fleet(Protocol):
    """Where clients run. Updates may come in any order; each as soon as its task is done."""

    def run(self, tasks: Iterable[Assignment]) -> Iterator[Update]:
        """Carry the tasks out, each asked for when it can begin: there may be very many."""
        ...


class SerialFleet:
    """Every client in this process, in the order of the tasks."""

    def __init__(self, side: ClientSide) -> None:
        self.side = side

    def run(self, tasks: Iterable[Assignment]) -> Iterator[Update]:
        """Carry the tasks out one by one; a task begins when the update before it was taken."""
        for task in tasks:
            yield self.side.carry_out(task)

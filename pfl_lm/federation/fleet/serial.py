"""A fleet of one process: clients take their turns one after another on one backbone."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Protocol

from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.messages import Assignment, Kind, Update


class Fleet(Protocol):
    """Where clients run. Updates come in the order of the tasks."""

    def order(self, kind: Kind, clients: Sequence[str]) -> list[str]:
        """Return clients in the order in which their tasks had best come."""
        ...

    def run(self, tasks: Iterable[Assignment]) -> Generator[Update]:
        """Carry the tasks out, each asked for when it can begin: there may be very many."""
        ...


class SerialFleet:
    """Every client in this process, in the order of the tasks."""

    def __init__(self, side: ClientSide) -> None:
        self.side = side

    def order(self, kind: Kind, clients: Sequence[str]) -> list[str]:
        """Leave them as they are."""
        return list(clients)

    def run(self, tasks: Iterable[Assignment]) -> Generator[Update]:
        """Carry the tasks out one by one; a task begins when the update before it was taken."""
        for task in tasks:
            yield self.side.carry_out(task)

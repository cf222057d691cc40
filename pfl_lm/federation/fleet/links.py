"""How ranks talk: messages from one to another, and numbers that all of them add up.

    messages   whole objects, from memory to memory; a rank may wait for one as long as turns take
    sums       on the ranks' own devices, by what these are best reduced with
    signals    one number each, from memory to memory, before every sum: is everybody still at it?

The groups are made once for a process. A connection that breaks is noticed at once; a rank that is
there and does not answer is waited for, within a step for `STEP_PATIENCE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist

from pfl_lm.errors import LostRankError

PATIENCE = timedelta(days=7)
"""How long a rank waits for another one's client: turns may differ by as much as clients do."""

STEP_PATIENCE = timedelta(minutes=30)
"""How long ranks that share a turn wait for each other within a step."""


@dataclass(frozen=True, slots=True)
class Links:
    """This rank's connections to the others.

    Attributes:
        rank: from 0; rank 0 leads.
        n_ranks: how many there are.
    """

    rank: int
    n_ranks: int
    messages: Any
    signals: Any
    sums: Any

    @property
    def others(self) -> list[int]:
        """The ranks beside this one."""
        return [rank for rank in range(self.n_ranks) if rank != self.rank]

    def send(self, message: object, to: int) -> None:
        """Hand a message over to a rank; what it holds must be in memory.

        Raises:
            LostRankError: the rank is gone.
        """
        with connected():
            dist.send_object_list([message], dst=to, group=self.messages)

    def receive(self, sender: int) -> Any:
        """Wait for a message of a rank.

        Raises:
            LostRankError: the rank is gone.
        """
        box = [None]
        with connected():
            dist.recv_object_list(box, src=sender, group=self.messages)
        return box[0]


@cache
def links() -> Links:
    """Connect this rank with the others; all ranks ask for it at the same place.

    Raises:
        LostRankError: one of them is gone.
    """
    with connected():
        return Links(
            rank=dist.get_rank(),
            n_ranks=dist.get_world_size(),
            messages=dist.new_group(backend="gloo", timeout=PATIENCE),
            signals=dist.new_group(backend="gloo", timeout=STEP_PATIENCE),
            sums=dist.new_group(timeout=STEP_PATIENCE),
        )


@contextmanager
def connected() -> Iterator[None]:
    """Talk to other ranks in the body; one that has ended in the meantime is no bug of this one.

    Raises:
        LostRankError: the connection is gone, or a rank does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if "timed out" in str(error).lower():
            raise LostRankError(
                "another rank does not answer",
                hint="see whether its machine or its process hangs; then end all ranks and resume",
            ) from error
        raise LostRankError(
            "another rank has ended before its time",
            hint="it has said why; if it said nothing it was killed, as for want of memory",
        ) from error

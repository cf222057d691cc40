"""Ranks that take one client's task together, each its share of the rows.

    rank 0    task ─► all ranks    every rank: the same turn, on its own rows
                                   once a step:  signals, then the sum of all gradients
              outcomes ◄─ all      rank 0 writes the state, and counts for all

Before every sum each rank gives a signal. One that has failed by itself, for want of memory say,
gives a signal of that and no further one; the others then leave the task too instead of waiting for
numbers that never come. At its end every rank signals once more, so that all of them leave at the
same place.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pfl_lm.errors import LostRankError, PflError, RanksApartError
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.fleet.desk import Outcome
from pfl_lm.federation.fleet.links import Links, connected
from pfl_lm.federation.messages import Assignment, Update
from pfl_lm.train.share import OtherRankFailedError


class Together:
    """A rank's share of what all ranks do together."""

    def __init__(self, links: Links) -> None:
        self.rank = links.rank
        self.n_ranks = links.n_ranks
        self._links = links

    def add_up(self, tensor: Tensor) -> None:
        """Make a tensor the sum of all ranks' in place, with the same bits on all.

        Raises:
            OtherRankFailedError: another rank has given up.
            LostRankError: another rank is gone.
        """
        self.signal()
        with connected():
            dist.all_reduce(tensor, group=self._links.sums)

    def all_have(self, mine: bool) -> bool:
        """Return whether every rank says yes; raises as `add_up` does."""
        self.signal()
        return self._count(mine) == self.n_ranks

    def refuse_apart(self, what: str, *vectors: Tensor) -> None:
        """Make sure that all ranks hold these numbers, bit for bit; also raises as `add_up` does.

        Raises:
            RanksApartError: they do not.
        """
        digest = hashlib.sha256()
        for vector in vectors:
            digest.update(vector.detach().cpu().contiguous().numpy().tobytes())
        own = int.from_bytes(digest.digest()[:7])
        ends = torch.tensor([own, -own])
        self.signal()
        with connected():
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._links.signals)
        if int(ends[0]) != -int(ends[1]):
            raise RanksApartError(
                f"{what}: after a turn that ranks took together they hold different numbers, as "
                "unlike processors may compute them",
                hint="run on machines that are alike, or write runtime.parallel: clients",
            )

    def signal(self, *, well: bool = True) -> None:
        """Say that this rank goes on, or that it has given up; hear of the others.

        Raises:
            OtherRankFailedError: another rank has given up, and this one has not.
            LostRankError: another rank is gone.
        """
        if self._count(not well) and well:
            raise OtherRankFailedError

    def _count(self, mine: bool) -> int:
        number = torch.tensor([int(mine)])
        with connected():
            dist.all_reduce(number, group=self._links.signals)
        return int(number)


def carried_out(side: ClientSide, task: Assignment) -> Outcome:
    """Return what comes of a task that this rank does by itself.

    Raises:
        LostRankError: another rank is gone.
    """
    try:
        return side.carry_out(task)
    except LostRankError:
        raise
    except PflError as error:
        return error
    except Exception:
        return traceback.format_exc()


def shared_outcome(side: ClientSide, task: Assignment, together: Together) -> Outcome | None:
    """Do this rank's part of a task; None if another rank has failed, which says why.

    ``side`` has the share ``together``.

    Raises:
        LostRankError: another rank is gone.
    """
    try:
        outcome = side.carry_out(task)
    except OtherRankFailedError:
        return None
    except LostRankError:
        raise
    except PflError as error:
        together.signal(well=False)
        return error
    except Exception:
        together.signal(well=False)
        return traceback.format_exc()
    try:
        together.signal(well=outcome.fault is None)
    except OtherRankFailedError:
        return None
    return outcome


def settled(outcomes: Sequence[Outcome | None]) -> Outcome:
    """Return what came of a task that all ranks took, rank 0's first: the first failure, if any."""
    said = [outcome for outcome in outcomes if outcome is not None]
    failed = [each for each in said if not isinstance(each, Update) or each.fault is not None]
    return failed[0] if failed else said[0]

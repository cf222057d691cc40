"""A fleet of ranks: the cohort spread over the processes of one Accelerate job.

    rank 0   orchestrator ─ wave of tasks ─► broadcast ─► its own task ─► gather ─► Updates
    rank n   serve()      ◄───────────────── broadcast ─► its own task ─► gather

Every rank holds a backbone of its own and does whole turns; nothing is averaged or reduced between
them. A client's turn is the same on any rank, so the adapters are those of one process with as many
threads. A client's state is written by the rank that ran it, as its machine would; the ledger, all
other files and the display are rank 0's.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from pfl_lm.errors import DismissedError, LostRankError, PflError
from pfl_lm.evaluate import BASE
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.fleet.start import connected
from pfl_lm.federation.messages import Assignment, Update
from pfl_lm.layout import Vector
from pfl_lm.recipe import TrainingOptions

_CPU = torch.device("cpu")  # what travels between ranks travels from memory to memory


class RankError(RuntimeError):
    """A rank failed in a way that is not the user's; the message is its traceback."""


@dataclass(frozen=True, slots=True)
class _Wave:
    """At most one task for each rank, and the training options they are meant for."""

    training: TrainingOptions
    tasks: tuple[Assignment, ...]


@dataclass(frozen=True, slots=True)
class _End:
    """There is nothing more to do, since all is done or since rank 0 has failed."""

    failed: bool


class RankFleet:
    """The orchestrator's side, on rank 0: hands out a wave, does its own part, gathers."""

    def __init__(self, side: ClientSide, accelerator: Accelerator) -> None:
        self.side = side
        self.accelerator = accelerator

    def run(self, tasks: Iterable[Assignment]) -> Iterator[Update]:
        """Carry the tasks out, one wave after another; updates come in the order of the tasks.

        A wave's tasks are asked for when the updates of the wave before were taken.

        Raises:
            PflError: a client's task failed for a reason the user can mend.
            RankError: a rank failed otherwise.
        """
        coming = iter(tasks)
        while now := tuple(islice(coming, self.accelerator.num_processes)):
            wave = _Wave(self.side.training, tuple(_task_on(task, _CPU) for task in now))
            for rank, update in enumerate(self._together(wave)):
                if rank:  # the others' work has not been counted here
                    self._count(update)
                yield _update_on(update, self.side.start.device)

    def _together(self, wave: _Wave) -> list[Update]:
        _shared(wave)
        updates = []
        for outcome in _outcomes(wave, self.side, self.accelerator):
            if isinstance(outcome, PflError):
                raise outcome
            if isinstance(outcome, str):
                raise RankError(outcome)
            updates.append(outcome)
        return updates

    def _count(self, update: Update) -> None:
        for _ in range(update.steps_done):
            self.side.watch.step()
        finishing = update.choice is not None  # the backbone's own rows are known by then
        rows = sum(
            score.rows
            for score in update.scores
            if not (finishing and (score.split, score.candidate) == ("validation", BASE))
        )
        if rows:
            self.side.watch.rows(rows)


@contextmanager
def leading(accelerator: Accelerator) -> Iterator[None]:
    """Do rank 0's part in the body, and let the other ranks go when it is over, well or not."""
    try:
        yield
    except LostRankError:  # nobody can be sure to be heard
        raise
    except Exception:
        if accelerator.num_processes > 1:
            with suppress(LostRankError):
                _shared(_End(failed=True))
        raise
    if accelerator.num_processes > 1:
        _shared(_End(failed=False))


def serve(make_side: Callable[[TrainingOptions], ClientSide], accelerator: Accelerator) -> None:
    """Work on a rank other than 0 until the orchestrator says that it is done.

    ``make_side`` builds the client side for the training options a wave is meant for.

    Raises:
        DismissedError: rank 0 has failed.
        LostRankError: a rank is gone.
    """
    side: ClientSide | None = None
    while isinstance(task := _shared(None), _Wave):
        if side is None or side.training != task.training:
            side = make_side(task.training)
        _outcomes(task, side, accelerator)
    if task is None or task.failed:
        raise DismissedError("rank 0 has failed")


def _shared(message: _Wave | _End | None) -> _Wave | _End | None:
    """Send rank 0's message to every rank; the others give None and get it."""
    box: list[_Wave | _End | None] = [message]
    with connected():
        broadcast_object_list(box, from_process=0)
    return box[0]


def _outcomes(
    wave: _Wave, side: ClientSide, accelerator: Accelerator
) -> list[Update | PflError | str]:
    """Do this rank's task, if the wave has one for it; return what came of all of them."""
    mine: list[Update | PflError | str] = []
    rank = accelerator.process_index
    if rank < len(wave.tasks):
        try:
            task = _task_on(wave.tasks[rank], side.start.device)
            mine = [_update_on(side.carry_out(task), _CPU)]
        except PflError as error:
            mine = [error]
        except Exception:
            mine = [traceback.format_exc()]
    with connected():
        gathered: list[Update | PflError | str] = gather_object(mine)
    return gathered


def _task_on(task: Assignment, device: torch.device) -> Assignment:
    return replace(task, sent=replace(task.sent, vectors=_moved(task.sent.vectors, device)))


def _update_on(update: Update, device: torch.device) -> Update:
    if update.upload is None:
        return update
    upload = replace(update.upload, vectors=_moved(update.upload.vectors, device))
    return replace(update, upload=upload)


def _moved(vectors: dict[str, Vector], device: torch.device) -> dict[str, Vector]:
    return {name: vector.to(device) for name, vector in vectors.items()}

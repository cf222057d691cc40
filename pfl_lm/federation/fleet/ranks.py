"""A fleet of ranks: the clients' tasks on the processes of one Accelerate job.

    rank 0   orchestrator ─ a task ─► its own work, and to every free rank ─► outcomes ─► Updates
    rank n   serve()      ◄─ a task ─ its work ─ the outcome ─►

Every rank holds a backbone of its own. With `clients` it does whole tasks: a client's turn is the
same on any rank, so the adapters are those of one process with as many threads. The longest tasks
begin first, and whoever is free takes the next, so that all ranks end together. With `data` all
ranks take each turn together (together.py), and score together what there is too little of to go
round. A client's state is written by the rank that ran it, as its machine would, or by rank 0; the
ledger, all other files and the display are rank 0's.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from threading import Thread

import torch
from accelerate import Accelerator

from pfl_lm.errors import DismissedError, LostRankError, PflError
from pfl_lm.evaluate import BASE
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.fleet.desk import Desk, Outcome
from pfl_lm.federation.fleet.links import Links, links
from pfl_lm.federation.fleet.together import Together, carried_out, settled, shared_outcome
from pfl_lm.federation.fleet.work import expected_work, longest_first
from pfl_lm.federation.messages import Assignment, Kind, Update
from pfl_lm.layout import Vector
from pfl_lm.recipe import TrainingOptions

_CPU = torch.device("cpu")  # what travels between ranks travels from memory to memory
_INTERRUPTED = 130  # the exit code of a process that was asked to stop


class RankError(RuntimeError):
    """A rank failed in a way that is not the user's; the message is its traceback."""


@dataclass(frozen=True, slots=True)
class _Work:
    """A task for a rank, the training options it is meant for, and whether all ranks take it."""

    training: TrainingOptions
    task: Assignment
    together: bool


@dataclass(frozen=True, slots=True)
class _End:
    """There is nothing more to do, since all is done or since rank 0 has failed."""

    failed: bool


class RankFleet:
    """The orchestrator's side, on rank 0.

    Args:
        side: what carries out tasks on this rank.
        links: the connections to the others.
        together: whether ranks share each client's turn; else each takes turns of its own.
    """

    def __init__(self, side: ClientSide, links: Links, *, together: bool = False) -> None:
        self.side = side
        self.links = links
        self.together = together
        self._had: dict[str, int] = {}  # which rank still remembers a client's rows

    def order(self, kind: Kind, clients: Sequence[str]) -> list[str]:
        """Return clients in the order in which their tasks should come: the longest first."""
        return longest_first(self.side, kind, clients)

    def run(self, tasks: Iterable[Assignment]) -> Generator[Update]:
        """Carry the tasks out; updates come in the order of the tasks, whoever is faster.

        So many tasks are asked for ahead as keep the other ranks at work until this one is free. To
        be closed if it is left early.

        Raises:
            PflError: a client's task failed for a reason the user can mend.
            RankError: a rank failed otherwise.
            LostRankError: a rank is gone.
        """
        coming = iter(tasks)
        first = list(islice(coming, self.links.n_ranks))
        if not first:
            return
        few = len(first) < self.links.n_ranks
        if self.together and (first[0].kind == "train" or few):
            yield from self._jointly(chain(first, coming))
        else:
            yield from self._spread(chain(first, coming))

    def _jointly(self, tasks: Iterable[Assignment]) -> Generator[Update]:
        together = Together(self.links)
        side = replace(self.side, share=together)
        for task in tasks:
            work = self._work(task, together=True)
            for rank in self.links.others:
                self.links.send(work, rank)
            mine = shared_outcome(side, task, together)
            outcomes: list[Outcome | None] = [mine]
            outcomes += [self.links.receive(rank) for rank in self.links.others]
            yield self._update(settled(outcomes))

    def _spread(self, tasks: Iterable[Assignment]) -> Generator[Update]:
        desk = Desk(self.links.n_ranks, self._had)
        attending = [
            Thread(target=self._attend, args=(desk, rank), daemon=True)
            for rank in self.links.others
        ]
        coming = iter(tasks)
        self._bring(desk, coming)
        desk.deal()
        for thread in attending:
            thread.start()
        try:
            own = desk.take(0)
            while own is not None:
                desk.answer(0, own, carried_out(self.side, own.task))
                self._bring(desk, coming)
                while (found := desk.collect(wait=False)) is not None:
                    yield self._counted(*found)
                own = desk.take(0)
            while (found := desk.collect(wait=True)) is not None:
                yield self._counted(*found)
        except BaseException as error:
            desk.close()
            if isinstance(error, Exception | GeneratorExit):
                _wait_for(attending)  # each rank's last task is still under way
            else:  # asked to stop, now
                atexit.register(_end_at_once, attending)
            raise
        desk.close()
        _wait_for(attending)

    def _bring(self, desk: Desk, coming: Iterator[Assignment]) -> None:
        """Bring tasks until the other ranks have enough to do while this one does its next."""
        while not desk.is_full and (task := next(coming, None)) is not None:
            desk.bring(task, expected_work(self.side, task.kind, task.client))

    def _attend(self, desk: Desk, rank: int) -> None:
        """Give a rank one task after another; runs beside this rank's own work."""
        try:
            while (handed := desk.wait_for(rank)) is not None:
                self.links.send(self._work(handed.task, together=False), rank)
                desk.answer(rank, handed, self.links.receive(rank))
        except BaseException as error:
            desk.break_off(error)

    def _work(self, task: Assignment, *, together: bool) -> _Work:
        return _Work(self.side.training, _task_on(task, _CPU), together)

    def _counted(self, rank: int, outcome: Outcome) -> Update:
        update = self._update(outcome)
        if rank:  # the others' work has not been counted here
            self._count(update)
        return update

    def _update(self, outcome: Outcome) -> Update:
        if isinstance(outcome, PflError):
            raise outcome
        if isinstance(outcome, str):
            raise RankError(outcome)
        return _update_on(outcome, self.side.start.device)

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


def _wait_for(attending: Sequence[Thread]) -> None:
    for thread in attending:
        thread.join()


def _end_at_once(attending: Sequence[Thread]) -> None:
    """End the process while a thread still waits for a rank: Python's own end would abort it."""
    if any(thread.is_alive() for thread in attending):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_INTERRUPTED)


@contextmanager
def leading(accelerator: Accelerator) -> Iterator[None]:
    """Do rank 0's part in the body, and let the other ranks go when it is over, well or not."""
    try:
        yield
    except LostRankError:  # nobody can be sure to be heard
        raise
    except Exception:
        with suppress(LostRankError):
            _dismiss(accelerator, failed=True)
        raise
    _dismiss(accelerator, failed=False)


def _dismiss(accelerator: Accelerator, *, failed: bool) -> None:
    if accelerator.num_processes > 1:
        for rank in links().others:
            links().send(_End(failed), rank)


def serve(make_side: Callable[[TrainingOptions], ClientSide]) -> None:
    """Work on a rank other than 0 until the orchestrator says that it is done.

    ``make_side`` builds the client side for the training options a task is meant for.

    Raises:
        DismissedError: rank 0 has failed.
        LostRankError: a rank is gone.
    """
    together = Together(links())
    side: ClientSide | None = None
    while isinstance(message := links().receive(0), _Work):
        if side is None or side.training != message.training:
            side = make_side(message.training)
        task = _task_on(message.task, side.start.device)
        outcome: Outcome | None
        if message.together:
            outcome = shared_outcome(replace(side, share=together), task, together)
            if isinstance(outcome, Update):  # rank 0 has the same vectors
                outcome = replace(outcome, upload=None)
        else:
            outcome = carried_out(side, task)
            if isinstance(outcome, Update):
                outcome = _update_on(outcome, _CPU)
        links().send(outcome, 0)
    if message.failed:
        raise DismissedError("rank 0 has failed")


def _task_on(task: Assignment, device: torch.device) -> Assignment:
    return replace(task, sent=replace(task.sent, vectors=_moved(task.sent.vectors, device)))


def _update_on(update: Update, device: torch.device) -> Update:
    if update.upload is None:
        return update
    upload = replace(update.upload, vectors=_moved(update.upload.vectors, device))
    return replace(update, upload=upload)


def _moved(vectors: dict[str, Vector], device: torch.device) -> dict[str, Vector]:
    return {name: vector.to(device) for name, vector in vectors.items()}

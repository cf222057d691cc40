"""pfl-lm itself: a client's whole turn as in a run, and the fit in the middle of it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
from typing_extensions import override

from pfl_lm.bench.case import Case, Did
from pfl_lm.bench.clock import Stopwatch
from pfl_lm.errors import PflError
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.faults import longest_update, upload_fault
from pfl_lm.federation.history import Member
from pfl_lm.federation.ledger import Ledger, size_in_bytes
from pfl_lm.federation.messages import Assignment
from pfl_lm.federation.rounds import upload_of
from pfl_lm.federation.store import Store
from pfl_lm.federation.watch import Watch
from pfl_lm.methods import METHODS, Setup
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.states import TrunkStates
from pfl_lm.train import LocalTrainer

ROUND = 1


@contextmanager
def turn(case: Case, steps: Stopwatch, *, trunk: TrunkStates | None) -> Iterator[Callable[[], Did]]:
    """Take the method's turn by the code that takes it in a run, from disk to disk.

    The client's state is read and checked, its numbers swapped in, the method's turn taken, the
    state written, the upload looked at and written, and the turn committed to a ledger.
    """
    with case.adapter(trunk=trunk) as adapter, TemporaryDirectory(dir=case.disk) as folder:
        side = _side(case, adapter, Path(folder), steps)
        server = side.method.init_server(side.start)
        sent = side.method.broadcast(server, case.client)
        most = longest_update(server)
        state = side.store.save_client(case.client, ROUND - 1, side.state(case.client, None))
        task = Assignment(
            run=case.recipe.name,
            round=ROUND,
            client=case.client,
            kind="train",
            sent=sent,
            state=state,
            steps=case.steps,
            seed=case.seed,
        )
        down = size_in_bytes(sent.vectors.values())
        with closing(Ledger(Path(folder) / "ledger.sqlite")) as ledger:
            n = side.dataset[case.client]
            member = Member(case.client, "client", len(n.train), len(n.validation), 0)
            ledger.open_run({}, [member])
            ledger.commit_cohort(ROUND, [case.client])

            def do() -> Did:
                update = side.carry_out(task)
                if update.fault is None:
                    upload = upload_of(update)
                    fault = upload_fault(sent, upload, most)
                else:
                    fault = update.fault
                if fault is not None:
                    raise PflError(f"client {case.client}: its turn has failed: {fault.message}")
                file = side.store.save_upload(case.client, ROUND, upload)
                ledger.commit_turn(update, file, bytes_down=down)
                return Did(up=size_in_bytes(upload.vectors.values()), down=down)

            yield do


@contextmanager
def fit(case: Case, steps: Stopwatch) -> Iterator[Callable[[], Did]]:
    """Take one fit of `LocalTrainer.train`, without method or disk."""
    with case.adapter(trunk=case.trunk) as adapter:
        start = adapter.read()
        side = _side(case, adapter, case.disk, steps)

        def do() -> Did:
            run = side.local_run(case.client, case.steps, case.seed)
            return Did(run.train(start, steps=case.steps))

        yield do


@dataclass
class _TimedSide(ClientSide):
    """The client's side of a run, with a stopwatch on every optimizer step."""

    steps: Stopwatch | None = None

    @override
    def local_run(self, *given: Any, **more: Any) -> LocalTrainer:
        run = super().local_run(*given, **more)
        assert self.steps is not None
        run.onlookers.append(Steps(self.steps))
        return run


class Steps(L.Callback):
    """Runs a stopwatch from each optimizer step's first micro-batch to its end."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self._seen = 0
        self._running = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from 0 in every fit of the turn."""
        self._seen, self._running = 0, False

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Begin a step, unless it has begun with a micro-batch before."""
        if not self._running:
            self._running = True
            self.stopwatch.start()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """End the step, if it was this micro-batch that the optimizer waited for."""
        if trainer.global_step > self._seen:
            self._seen, self._running = trainer.global_step, False
            self.stopwatch.stop()


def _side(case: Case, adapter: Adapter, folder: Path, steps: Stopwatch) -> _TimedSide:
    recipe = case.recipe
    setup = Setup(
        layout=adapter.layout,
        n_clients=len(case.dataset),
        seed=recipe.seed,
        training=recipe.training,
        aggregation=recipe.aggregation,
    )
    return _TimedSide(
        method=METHODS[recipe.method.name](recipe.method, setup),
        adapter=adapter,
        start=adapter.read(),
        dataset=case.dataset,
        training=recipe.training,
        pad_token_id=case.backbone.pad_token_id,
        store=Store(folder, {case.client: "client"}, case.device),
        watch=Watch(),
        group_by_length=recipe.data.group_by_length,
        diagnose=recipe.runtime.diagnostics,
        steps=steps,
    )

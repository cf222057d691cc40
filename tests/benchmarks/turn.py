"""What a client's turn costs beside its optimizer steps, in a whole run.

    python -m tests.benchmarks.turn [--tiny] [--repeats N]

Runs a federation and takes, between two clients' turns of one round, everything that is not an
optimizer step: reading the client's state, swapping its numbers in, building the Trainer, setting
the fit up, writing state and upload, and the ledger's commit. Steps themselves, and what a loop
written by hand would take for them, are for `pfl-lm bench`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from pfl_lm.federation.messages import Update
from pfl_lm.federation.watch import RoundReport, Watch
from pfl_lm.finetune import finetune
from pfl_lm.train import LocalTrainer
from tests.benchmarks.measure import Times, arguments, now, show, table
from tests.benchmarks.world import recipe


class Stopwatch(L.Callback):
    """Adds up what passes between the start and the end of every step."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self._began = (0.0, 0.0)

    def on_train_batch_start(self, *args: Any) -> None:
        self._began = now()

    def on_train_batch_end(self, *args: Any) -> None:
        wall, cpu = now()
        self.wall += wall - self._began[0]
        self.cpu += cpu - self._began[1]


class BetweenTurns(Watch):
    """Takes the time from one client's turn to the next, less that of the steps."""

    def __init__(self) -> None:
        self.steps = Stopwatch()
        self.fixed = Times()
        self._mark: tuple[float, float] | None = None

    def turn(self, update: Update) -> None:
        wall, cpu = now()
        if self._mark is not None and update.round > 1:  # the first round warms up
            spent = wall - self._mark[0] - self.steps.wall, cpu - self._mark[1] - self.steps.cpu
            self.fixed.add(*spent)
        self.steps.wall = self.steps.cpu = 0.0
        self._mark = now()

    def round(self, report: RoundReport) -> None:
        self._mark = None


def fixed_cost(folder: Path, *, tiny: bool, repeats: int) -> None:
    """Run a federation and show what its turns cost beside their steps."""
    watch = BetweenTurns()
    loaded = recipe(folder, tiny=tiny, **{"federation.rounds": repeats})
    with watching(watch.steps):
        finetune(loaded, watch)
    name = f"a {loaded.recipe.method.name} turn less its steps"
    show("fixed cost of a turn", table({name: watch.fixed}), watch.fixed.numbers)


@contextmanager
def watching(stopwatch: Stopwatch) -> Iterator[None]:
    """Put a stopwatch into every fit while the body runs."""
    train = LocalTrainer.train

    def timed(self: LocalTrainer, start: Tensor, *, callbacks: Any = (), **more: Any) -> Tensor:
        return train(self, start, callbacks=[*callbacks, stopwatch], **more)

    LocalTrainer.train = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        LocalTrainer.train = train  # type: ignore[method-assign]


def main() -> None:
    given = arguments(__doc__, repeats=8)
    with tempfile.TemporaryDirectory() as folder:
        fixed_cost(Path(folder), tiny=given.tiny, repeats=given.repeats)


if __name__ == "__main__":
    main()

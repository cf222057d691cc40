"""What a person sees while a comparison runs: a line a cell, and how much time is left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.text import Text

from pfl_lm.cli.display import Estimate, duration, live_line
from pfl_lm.cli.exits import plain
from pfl_lm.cli.interrupts import Interrupts
from pfl_lm.compare.cells import Cell
from pfl_lm.compare.plan import Plan
from pfl_lm.compare.running import CellsWatch
from pfl_lm.evaluate.rates import own_validation
from pfl_lm.evaluate.trials import Trial
from pfl_lm.federation.watch import RoundReport, Workload


class CellsDisplay(CellsWatch):
    """Shows a comparison on a console, as a context manager around it."""

    def __init__(self, console: Console, plan: Plan, interrupts: Interrupts) -> None:
        self.console = console
        self.interrupts = interrupts
        self._rows_in_step = plan.loaded.recipe.training.rows_in_step
        self._total = self._over = 0
        self._took: list[float] = []
        self._began = time.perf_counter()
        self._estimate: Estimate | None = None
        self._rounds = 0
        self._name = ""
        self._progress = live_line(console)
        self._task = self._progress.add_task("", total=1.0, left="", visible=False)

    def __enter__(self) -> Self:
        """Start the live line, where there is a terminal."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the live line away."""
        self._progress.stop()

    def note(self, text: str) -> None:
        """Print one line."""
        self._print(text)

    def cells(self, n: int, n_over: int) -> None:
        """Say how much there is to do."""
        self._total, self._over = n, n_over
        done = f", {n_over} of them done" if n_over else ""
        self._print(f"{n} runs{done}")

    def cell(self, cell: Cell) -> None:
        """Begin a cell's line."""
        self._name, self._estimate = cell.name, None
        self._began = time.perf_counter()
        self._progress.update(self._task, description=f"{self._place}  {cell.name}", visible=True)

    def begin(self, workload: Workload) -> None:
        """Take note of how much there is to do in this cell."""
        self.interrupts.patient = True
        self._rounds = workload.rounds
        self._estimate = Estimate(workload, self._rows_in_step)

    def step(self) -> None:
        """Count one optimizer step; a comparison that was asked to stop does so here."""
        self._count("steps", 1)

    def rows(self, n: int) -> None:
        """Count scored rows; a comparison that was asked to stop does so here."""
        self._count("rows", n)

    def round(self, report: RoundReport) -> None:
        """Name the round that is over."""
        about = f"{self._place}  {self._name}  round {report.round}/{self._rounds}"
        self._progress.update(self._task, description=about)
        if report.round == self._rounds:
            self.interrupts.patient = False  # what is left is writing files

    def over(self, trial: Trial, seconds: float) -> None:
        """Print the cell's line."""
        self._over += 1
        self._took.append(seconds)
        parts = [f"{self._over}/{self._total}  {trial.name}"]
        if trial.outcome is not None:
            parts.append(f"validation {own_validation(trial.outcome):.3f}")
        else:
            parts.append(f"{trial.state}: {trial.reason}" if trial.reason else trial.state)
        parts.append(duration(seconds))
        left = self._seconds_left(0.0)
        if self._over < self._total and left is not None:
            parts.append(f"about {duration(left)} left")
        self._print(" · ".join(parts))

    @property
    def _place(self) -> str:
        return f"{self._over + 1}/{self._total}"

    def _count(self, kind: str, n: int) -> None:
        if self._estimate is not None:
            self._estimate.did(kind, n)
            here = self._estimate.seconds_left
            left = None if here is None else self._seconds_left(here)
            self._progress.update(
                self._task,
                completed=self._estimate.share,
                left="" if left is None else f"about {duration(left)} left",
            )
        self.interrupts.check()

    def _seconds_left(self, here: float) -> float | None:
        """Return the time until the end: of the cell that runs, and of as many like the others."""
        running = 1 if self._estimate is not None and here else 0
        rest = max(0, self._total - self._over - running)
        took = self._took or [time.perf_counter() - self._began + here]
        return here + rest * sum(took) / len(took)

    def _print(self, text: str) -> None:
        self.console.print(Text(plain(text)), soft_wrap=True)

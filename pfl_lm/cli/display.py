"""What a person sees while a run goes on: one live line at a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from pfl_lm.cli.exits import label, plain
from pfl_lm.cli.interrupts import Interrupts
from pfl_lm.federation.messages import Update
from pfl_lm.federation.watch import RoundReport, Watch, Workload

_A_STEP_IN_ROWS = 2.0
"""A step's cost per row of its batch against scoring a row, until both have been measured."""


class Estimate:
    """How much time is left, from how long each kind of work has taken so far."""

    def __init__(self, workload: Workload, rows_in_step: int) -> None:
        self.left = {"steps": workload.steps, "rows": workload.rows}
        self._done = {"steps": 0, "rows": 0}
        self._seconds = {"steps": 0.0, "rows": 0.0}
        self._rows_in_step = rows_in_step
        self._mark = time.perf_counter()

    def did(self, kind: str, n: int) -> None:
        """Count ``n`` steps or rows that were done since the last call."""
        now = time.perf_counter()
        self._seconds[kind] += now - self._mark
        self._done[kind] += n
        self.left[kind] = max(self.left[kind] - n, 0)
        self._mark = now

    @property
    def share(self) -> float:
        """How much of the work is done, from 0 to 1, by time."""
        spent = sum(self._seconds.values())
        left = self.seconds_left
        return 0.0 if left is None else spent / (spent + left) if spent + left else 1.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end; None before anything was measured."""
        cost = {k: self._seconds[k] / n for k, n in self._done.items() if n}
        if not cost:
            return None
        ratio = _A_STEP_IN_ROWS * self._rows_in_step
        cost.setdefault("steps", cost.get("rows", 0.0) * ratio)
        cost.setdefault("rows", cost["steps"] / ratio)
        return sum(cost[kind] * n for kind, n in self.left.items())


class Display(Watch):
    """Shows a run on a console, as a context manager around it."""

    def __init__(
        self, console: Console, rows_in_step: int, interrupts: Interrupts | None = None
    ) -> None:
        self.console = console
        self.interrupts = interrupts or Interrupts()
        self.rows_in_step = rows_in_step
        self.workload: Workload | None = None
        self.estimate: Estimate | None = None
        self._progress = live_line(console)
        self._task: TaskID | None = None

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

    def begin(self, workload: Workload) -> None:
        """Say how much there is to do."""
        self.interrupts.patient = True
        self.workload = workload
        self.estimate = Estimate(workload, self.rows_in_step)
        self._task = self._progress.add_task("round 1", total=1.0, left="")
        if workload.done is None:
            self._print(f"{workload.clients} clients, {workload.rounds} rounds: {_to_do(workload)}")
        else:
            over = f"round {workload.done} of {workload.rounds} is over"
            self._print(f"{workload.clients} clients, {over}; left to do: {_to_do(workload)}")

    def step(self) -> None:
        """Count one optimizer step; a run that was asked to stop does so here."""
        self._count("steps", 1)
        self.interrupts.check()

    def rows(self, n: int) -> None:
        """Count scored rows; a run that was asked to stop does so here."""
        self._count("rows", n)
        self.interrupts.check()

    def turn(self, update: Update) -> None:
        """Name the client whose turn is over."""
        if self._task is not None and self.workload is not None:
            about = f"round {update.round}/{self.workload.rounds}  {label(update.client)}"
            self._progress.update(self._task, description=about)

    def round(self, report: RoundReport) -> None:
        """Print one line about a round."""
        assert self.workload is not None
        parts = [f"round {report.round}/{self.workload.rounds}"]
        if report.round:
            parts.append(f"{report.cohort} clients")
        if report.train_loss is not None:
            parts.append(f"train {report.train_loss:.3f}")
        parts += [
            f"validation ({report.candidate}) mean {report.mean:.3f}",
            f"worst {report.worst:.3f} {label(report.worst_client)}",
        ]
        if report.bytes_up:
            parts.append(f"{report.bytes_up / 1e6:.1f} MB up")
        parts.append(duration(report.seconds))
        left = self.estimate.seconds_left if self.estimate else None
        if left:
            parts.append(f"{duration(left)} left")
        self._print(" · ".join(parts))
        if report.round == self.workload.rounds:
            self.interrupts.patient = False  # what is left is writing files

    def _count(self, kind: str, n: int) -> None:
        if self.estimate is None:
            return
        self.estimate.did(kind, n)
        if self._task is not None:
            left = self.estimate.seconds_left
            text = "" if left is None else f"about {duration(left)} left"
            self._progress.update(self._task, completed=self.estimate.share, left=text)

    def _print(self, text: str) -> None:
        self.console.print(Text(plain(text)), soft_wrap=True)


def live_line(console: Console) -> Progress:
    """Return a line with a bar and the time left (field ``left``); none where there is a pipe."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _to_do(workload: Workload) -> str:
    return f"{workload.steps} optimizer steps, {workload.rows} rows to score"


def duration(seconds: float) -> str:
    """Return a time as a person says it: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

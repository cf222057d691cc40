"""Comparisons in miniature: three methods, two rates, two seeds, on the tiny backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pfl_lm.compare.cells import Cell
from pfl_lm.compare.plan import Asked, Plan, make_plan
from pfl_lm.compare.reading import read_cells
from pfl_lm.compare.running import CellsWatch, run_cells
from pfl_lm.evaluate.trials import Trial
from tests.tiny import tiny_recipe

METHODS = ("pflalign", "fedavg:adamw@0.001/0.01")  # and local, which comes by itself
CELLS = (
    *("pflalign-s7-r0.1", "pflalign-s7-r0.3"),
    *("fedavg-adamw-s7-r0.001", "fedavg-adamw-s7-r0.01", "local-s7-r0.1", "local-s7-r0.3"),
    *("pflalign-s3-r0.3", "fedavg-adamw-s3-r0.01", "local-s3-r0.3"),
)


class Killed(BaseException):
    """What a process that ends sees of it, in a test."""


class Told(CellsWatch):
    """Keeps what it is told, and ends the process after so many optimizer steps."""

    def __init__(self, steps: int | None = None) -> None:
        self.steps = steps
        self.began: list[str] = []
        self.ended: list[Trial] = []
        self.counts: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self) -> None:
        if self.steps is not None:
            self.steps -= 1
            if self.steps < 0:
                raise Killed

    def cells(self, n: int, n_over: int) -> None:
        self.counts.append((n, n_over))

    def cell(self, cell: Cell) -> None:
        self.began.append(cell.name)

    def over(self, trial: Trial, seconds: float) -> None:
        assert seconds > 0
        self.ended.append(trial)


def plan_in(
    folder: Path,
    *,
    methods: tuple[str, ...] = METHODS,
    seeds: str = "7,3",
    rates: str | None = "0.1,0.3",
    output: Path | None = None,
    overrides: tuple[str, ...] = (),
    **changes: Any,
) -> Plan:
    """Plan a comparison of a tiny recipe in ``folder``."""
    folder.mkdir(exist_ok=True)
    recipe = tiny_recipe(folder, **changes)
    return make_plan(recipe, overrides, Asked(methods, seeds, rates, output))


def run_in(folder: Path, **changes: Any) -> tuple[Plan, Told]:
    """Run such a comparison."""
    plan, told = plan_in(folder, **changes), Told()
    run_cells(plan, told)
    return plan, told


def timeless(plan: Plan) -> list[Trial]:
    """Return the trials of a comparison without their clocks."""
    return [
        replace(t, outcome=None if t.outcome is None else replace(t.outcome, seconds=0.0))
        for t in read_cells(plan).trials
    ]

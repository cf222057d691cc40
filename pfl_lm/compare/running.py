"""Running the cells of a comparison, one after another, with one backbone loaded once.

A cell is a run like any other. One that was interrupted is gone on with, one that is over is left
as it is, and one that has diverged is over: that is what it came to, and its ledger says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import closing

from pfl_lm.compare.cells import Cell, following_cells, grid_cells
from pfl_lm.compare.plan import Plan
from pfl_lm.compare.reading import FAILED, Found, rates_of, read_cell, read_cells
from pfl_lm.errors import DismissedError, DivergedError, LostRankError, PflError
from pfl_lm.evaluate.trials import OVER, Trial
from pfl_lm.federation.faults import DIVERGED, TooFewClientsError
from pfl_lm.federation.fleet.start import join_ranks, set_threads
from pfl_lm.federation.folder import LEDGER
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.lock import run_lock
from pfl_lm.federation.watch import Watch
from pfl_lm.finetune import Common, finetune, load_common
from pfl_lm.resume import glance, has_begun


class CellsWatch(Watch):
    """Told of the cells as well as of what goes on in each; does nothing."""

    def cells(self, n: int, n_over: int) -> None:
        """Hear how many cells there are in all, at most, and how many of them are over."""

    def cell(self, cell: Cell) -> None:
        """Hear which cell is run next."""

    def over(self, trial: Trial, seconds: float) -> None:
        """Hear what became of a cell, and how long it took."""


def run_cells(plan: Plan, watch: CellsWatch) -> Found:
    """Run every cell that is not over, and return all of them as they are then.

    Raises:
        PflError: the backbone cannot be loaded, cells in the folder do not fit, or a cell cannot be
            run for another reason than that it diverges.
    """
    found = read_cells(plan)
    if not found.n_left:
        return found
    recipe = plan.loaded.recipe
    accelerator = join_ranks(recipe.runtime)
    set_threads(recipe.runtime, accelerator)
    common = load_common(recipe, plan.clients, accelerator.device, watch)
    found = read_cells(plan, common.backbone.fingerprint)
    watch.cells(found.n_over + found.n_left, found.n_over)
    runner = _Runner(plan, common, watch, {trial.name: trial for trial in found.trials})
    grids = rates_of(plan, runner.run(grid_cells(plan)))
    runner.run(following_cells(plan, grids))
    return read_cells(plan, common.backbone.fingerprint)


class _Runner:
    def __init__(
        self, plan: Plan, common: Common, watch: CellsWatch, known: dict[str, Trial]
    ) -> None:
        self.plan = plan
        self.common = common
        self.watch = watch
        self.known = known

    def run(self, cells: Iterable[Cell]) -> list[Trial]:
        """Run those that are not over, in order; return the trials of all."""
        return [self._run(cell) for cell in cells]

    def _run(self, cell: Cell) -> Trial:
        trial = self.known.get(cell.name)
        if trial is not None and trial.state in OVER:
            return trial
        began = time.perf_counter()
        self.watch.cell(cell)
        try:
            self._finetune(cell)
        except (DismissedError, LostRankError):
            raise
        except PflError as error:
            if not _has_diverged(cell, error):
                raise PflError(f"cell {cell.name}: {error.message}", hint=error.hint) from error
            _note_failure(cell, error)
        trial = read_cell(self.plan, cell, self.common.backbone.fingerprint)
        self.watch.over(trial, time.perf_counter() - began)
        return trial

    def _finetune(self, cell: Cell) -> None:
        begun = has_begun(cell.loaded.run_folder)
        finetune(cell.loaded, self.watch, self.plan.clients, resume=begun, common=self.common)


def _has_diverged(cell: Cell, error: PflError) -> bool:
    """Return whether a cell has ended because its training left the finite numbers."""
    with glance(cell.loaded.run_folder) as ledger:
        if ledger is None:
            return False
        kinds = {kind for kind, _ in ledger.faults(ledger.last_begun()).values()}
    too_few = isinstance(error, TooFewClientsError) and bool(kinds) and kinds <= set(DIVERGED)
    return isinstance(error, DivergedError) or too_few


def _note_failure(cell: Cell, error: PflError) -> None:
    folder = cell.loaded.run_folder
    with run_lock(folder), closing(Ledger(folder / LEDGER)) as ledger:
        ledger.note(FAILED, " ".join(error.message.split())[:500])

"""From the run folders of a comparison to its trials: what is there, what it says, what is missing.

A cell that was copied here from another machine is read like any other, and believed no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pfl_lm.compare.cells import Cell, following_cells, grid_cells, other_cells
from pfl_lm.compare.fit import digest, misfits
from pfl_lm.compare.plan import CELLS, Plan
from pfl_lm.errors import PflError, RunFolderError, listed
from pfl_lm.evaluate.choice import BASE
from pfl_lm.evaluate.rates import Grid, choose_rate
from pfl_lm.evaluate.trials import OVER, ClientScore, Outcome, Trial
from pfl_lm.federation.history import History
from pfl_lm.resume import glance, run_recipe

ABOUT = ("device", "threads", "pfl_lm", "python", "torch", "transformers", "peft", "lightning")
FAILED = "failed"
"""The key under which a cell's ledger says that it has diverged, and how."""


@dataclass(frozen=True, slots=True)
class Found:
    """All that a comparison's folder holds of it, and what it lacks.

    Attributes:
        trials: of the first seed at every rate; of the others at the chosen rates, and at any other
            rate that was run.
        n_over: cells that have nothing more to do, of those that the comparison takes.
        missing: names of the cells that have yet to be run, or run to their end.
        n_unnamed: cells that come after these, at rates that are not chosen yet.
        strangers: names of folders among the cells that belong to no trial of this comparison.
    """

    trials: tuple[Trial, ...]
    n_over: int
    missing: tuple[str, ...]
    n_unnamed: int
    strangers: tuple[str, ...]

    @property
    def n_left(self) -> int:
        """How many cells are left to be run."""
        return len(self.missing) + self.n_unnamed


def read_cells(plan: Plan, backbone: str = "") -> Found:
    """Read every cell of a comparison.

    ``backbone`` is the fingerprint of the one that is loaded, if one is.

    Raises:
        RunFolderError: cells do not belong to this comparison, or cannot be read; all are named.
    """
    reader = _Reader(plan, backbone)
    wanted = [reader.read(cell) for cell in grid_cells(plan)]
    grids = rates_of(plan, wanted)
    wanted += [reader.read(cell) for cell in following_cells(plan, grids)]
    names = {trial.name for trial in wanted}
    others = [reader.read(cell) for cell in other_cells(plan) if cell.name not in names]
    reader.raise_if_any()
    trials = (*wanted, *(trial for trial in others if trial.state != "missing"))
    known = {trial.name for trial in trials}
    return Found(
        trials=trials,
        n_over=sum(trial.state in OVER for trial in wanted),
        missing=tuple(trial.name for trial in wanted if trial.state not in OVER),
        n_unnamed=(len(plan.seeds) - 1) * sum(not grid.settled for grid in grids),
        strangers=tuple(name for name in _folders(plan.folder / CELLS) if name not in known),
    )


def read_cell(plan: Plan, cell: Cell, backbone: str) -> Trial:
    """Read one cell; as `read_cells`."""
    reader = _Reader(plan, backbone)
    trial = reader.read(cell)
    reader.raise_if_any()
    return trial


def rates_of(plan: Plan, trials: list[Trial]) -> list[Grid]:
    """Return each contender's grid, from the trials of the first seed."""
    return [
        choose_rate([t for t in trials if t.label == c.label and t.seed == plan.seeds[0]])
        for c in plan.contenders
    ]


class _Reader:
    """Reads one cell after another, and gathers what is wrong with them.

    Attributes:
        faults: a line for each cell that does not fit.
        backbone: the fingerprint that all must have: the given one, or the first cell's.
    """

    def __init__(self, plan: Plan, backbone: str) -> None:
        self.plan = plan
        self.backbone = backbone
        self.faults: list[str] = []

    def raise_if_any(self) -> None:
        """Raise if a cell did not fit."""
        if self.faults:
            raise RunFolderError(
                listed(f"{self.plan.folder}: cells that do not fit this comparison", self.faults),
                hint="remove their folders to have them run anew; or give --output another folder",
            )

    def read(self, cell: Cell) -> Trial:
        """Return what became of a cell."""
        folder = cell.loaded.run_folder
        try:
            with glance(folder) as ledger:
                if ledger is None:
                    return _missing(cell)
                about = ledger.about()
                stored = run_recipe(folder).recipe
                wrong = [*misfits(cell, self.plan, stored, ledger.members())]
                backbone = about.get("backbone", "")
                if backbone != (self.backbone or backbone):
                    wrong.append("another backbone, or the same in another precision")
                if wrong:
                    self.faults.append(f"{cell.name}: {'; '.join(wrong)}")
                    return _missing(cell)
                self.backbone = backbone
                return _read(cell, self.plan, ledger, about)
        except PflError as error:
            self.faults.append(f"{cell.name}: {error.message}")
        return _missing(cell)


def _read(cell: Cell, plan: Plan, ledger: History, about: dict[str, str]) -> Trial:
    rows = {client: rows.sha256 for client, rows in plan.clients.items()}
    trial = replace(
        _missing(cell),
        about={key: about[key] for key in ABOUT if key in about},
        digest=digest(cell.loaded.recipe, rows, about.get("backbone", "")),
    )
    rounds = cell.loaded.recipe.federation.rounds
    if about.get("finished") == str(rounds):
        return replace(trial, state="finished", outcome=_outcome(cell, ledger, about))
    if FAILED in about:
        return replace(trial, state="failed", reason=about[FAILED])
    over = ledger.last_round()
    reason = f"{'no round' if over is None else f'round {over}'} of {rounds} is over"
    return replace(trial, state="begun", reason=reason)


def _missing(cell: Cell) -> Trial:
    recipe = cell.contender.loaded.recipe
    return Trial(
        name=cell.name,
        label=cell.contender.label,
        method=recipe.method.name,
        optimizer=recipe.training.optimizer or "",
        seed=cell.seed,
        rate=cell.rate,
        state="missing",
    )


def _outcome(cell: Cell, ledger: History, about: dict[str, str]) -> Outcome:
    """Return what a finished run came to.

    Raises:
        RunFolderError: its ledger does not hold what a finished run's does.
    """
    own = about.get("own_candidate", "")
    scores: dict[str, dict[str, dict[str, ClientScore]]] = {}
    for client, split, candidate, nll, rows, tokens in ledger.final_scores():
        score = ClientScore(_number(nll), _whole(rows), _whole(tokens))
        scores.setdefault(client, {}).setdefault(split, {})[candidate] = score
    chosen = {client: choice.candidate for client, choice in ledger.choices().items()}
    costs = ledger.costs()
    rate = about.get("learning_rate", cell.rate)
    outcome = Outcome(
        own=own,
        chosen=chosen,
        scores=scores,
        curve=tuple((round, _number(mean)) for round, mean in ledger.validation_means(own)),
        steps=costs.steps,
        bytes_down=costs.bytes_down,
        bytes_up=costs.bytes_up,
        seconds=costs.seconds,
        faults=costs.faults,
        learning_rate=_number(rate),
    )
    members = {member.client for member in ledger.members()}
    if not chosen.keys() == scores.keys() == members or any(_gaps(outcome)):
        raise RunFolderError("its ledger does not hold the scores of a finished run")
    return outcome


def _gaps(outcome: Outcome) -> Iterator[bool]:
    """Yield, for each score there must be, whether it is no finite number."""
    yield not outcome.curve
    yield from (not math.isfinite(value) for _, value in outcome.curve)
    for client, splits in outcome.scores.items():
        for split in {"validation", *splits}:
            for candidate in (outcome.own, outcome.chosen[client], BASE):
                score = splits.get(split, {}).get(candidate)
                yield score is None or not math.isfinite(score.nll) or score.rows < 1


def _number(value: object) -> float:
    """Return a number as it stands in a ledger, which may hold anything; NaN for anything else."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _whole(value: object) -> int:
    number = _number(value)
    return int(number) if math.isfinite(number) else 0


def _folders(cells: Path) -> list[str]:
    return sorted(each.name for each in cells.iterdir() if each.is_dir()) if cells.is_dir() else []

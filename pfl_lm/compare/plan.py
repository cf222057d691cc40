"""What a comparison is, checked before anything runs: contenders, seeds, folder. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pfl_lm.data.splits import ClientRows
from pfl_lm.errors import PflError, RecipeError, RunFolderError
from pfl_lm.federation.folder import LEDGER
from pfl_lm.preflight import as_one, check_read, try_to
from pfl_lm.recipe import LoadedRecipe
from pfl_lm.recipe.compared import read_list
from pfl_lm.recipe.contenders import Contender, contenders
from pfl_lm.recipe.draft import Draft, read_draft, set_in
from pfl_lm.recipe.load import valid_parts
from pfl_lm.recipe.overrides import Override
from pfl_lm.recipe.scalars import Value

CELLS = "cells"
"""The folder, in that of the comparison, in which every run has one of its own."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for on the command line; what was not is as in the recipe's ``compare``."""

    methods: Sequence[str] = ()
    seeds: str | None = None
    rates: str | None = None
    output: Path | None = None

    def overrides(self) -> list[Override]:
        """Return the options as overrides of the recipe."""
        found = []
        if self.methods:
            text = ",".join(self.methods)
            names: list[Value] = [item.strip() for item in text.split(",") if item.strip()]
            found.append(Override(("compare", "methods"), names, f"--methods {text}"))
        for name in ("seeds", "rates"):
            text = getattr(self, name)
            if text is not None:
                items = list(read_list(text))
                found.append(Override(("compare", name), items, f"--{name} {text}"))
        return found

    def words(self) -> list[str]:
        """Return the options as they are typed."""
        methods = ["--methods", ",".join(self.methods)] if self.methods else []
        seeds = [] if self.seeds is None else ["--seeds", self.seeds]
        rates = [] if self.rates is None else ["--rates", self.rates]
        output = [] if self.output is None else ["--output", str(self.output)]
        return [*methods, *seeds, *rates, *output]


@dataclass(frozen=True, slots=True)
class Plan:
    """A comparison that is ready to be run.

    Attributes:
        loaded: the recipe that all share.
        clients: every client's rows, in the order of their ids.
        seeds: the first one's runs choose the learning rates.
        folder: the comparison's own, absolute.
    """

    loaded: LoadedRecipe
    clients: Mapping[str, ClientRows] = field(repr=False)
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    folder: Path


def make_plan(path: Path, overrides: Sequence[str], asked: Asked) -> Plan:
    """Check a recipe, the files it names, and everything it compares.

    Raises:
        PflError: anything is wrong; all of it.
    """
    draft = set_in(read_draft(path, overrides), asked.overrides())
    faults: list[PflError] = []
    checked = try_to(lambda draft: check_read(draft, to_run=False), draft, faults)
    folder = _folder(draft, asked)
    try_to(_refuse_nothing, draft, faults)
    try_to(_refuse_no_place, folder, faults)
    try_to(_refuse_ranks, os.environ.get("WORLD_SIZE", "1"), faults)
    if faults or checked is None or folder is None:
        raise as_one(faults)
    recipe = checked.loaded.recipe
    seeds = tuple(recipe.compare.seeds if recipe.compare is not None else ()) or (recipe.seed,)
    return Plan(checked.loaded, checked.clients, contenders(draft), seeds, folder)


def _folder(draft: Draft, asked: Asked) -> Path | None:
    """Return the comparison's folder; None if the recipe does not say it validly."""
    if asked.output is not None:
        return asked.output.expanduser().absolute()
    run = valid_parts(draft).run_folder
    return None if run is None else run.with_name(f"{run.name}-compare")


def _refuse_nothing(draft: Draft) -> None:
    section = draft.data.get("compare")
    if not isinstance(section, dict) or not section.get("methods"):
        raise RecipeError(
            f"{draft.path}: no methods to compare",
            hint="name them: --methods pflalign,fedavg,fedavg:sgd; or in the recipe's `compare`",
        )


def _refuse_no_place(folder: Path) -> None:
    other = "choose another folder with --output"
    try:
        if (folder / LEDGER).exists():
            raise RunFolderError(f"{folder}: holds a run, not a comparison", hint=other)
        above = next(each for each in (folder, *folder.parents) if each.exists())
        if not above.is_dir():
            raise RunFolderError(f"{folder}: {above} is a file, not a folder", hint=other)
        if not os.access(above, os.W_OK | os.X_OK):
            raise RunFolderError(f"{folder}: {above} is not writable", hint=other)
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be used ({error.strerror})", hint=other) from None


def _refuse_ranks(ranks: str) -> None:
    if ranks != "1":
        raise PflError(
            f"a comparison is run by one process, and this is one of {ranks}",
            hint="start it without torchrun; to share the work, give other machines other methods "
            "and copy their folders together",
        )

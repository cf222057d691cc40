"""What can be checked before anything heavy is loaded or written. Torch-free.

Every check runs even if another one fails, so that a person sees all there is to mend at once.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from pfl_lm.data.fitting import refuse_misfit_rows
from pfl_lm.data.population import Population, read_population
from pfl_lm.data.splits import ClientRows, rows_to_train
from pfl_lm.errors import PflError, RunFolderError
from pfl_lm.federation.availability import Trace, read_trace
from pfl_lm.federation.cohort import refuse_small_rounds
from pfl_lm.federation.folder import LEDGER, LOCK, NOT_BEGUN
from pfl_lm.model.gguf import converted_folder
from pfl_lm.model.package import folder_path, gguf_path
from pfl_lm.model.targets import refuse_misfit
from pfl_lm.recipe.checks import (
    refuse_many_threads,
    refuse_no_model,
    refuse_no_opacus,
    refuse_no_quantizer,
    refuse_no_tracker,
)
from pfl_lm.recipe.clients import refuse_idle_rules
from pfl_lm.recipe.contenders import contenders
from pfl_lm.recipe.draft import Draft, read_draft
from pfl_lm.recipe.load import LoadedRecipe, Parts, check_draft, valid_parts
from pfl_lm.recipe.sections import BackboneOptions, FederationOptions
from pfl_lm.resume import has_begun, run_clients

Part = TypeVar("Part")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Checked:
    """A recipe that is ready to run, and every client's rows, in the order of their ids.

    ``notes`` say which clients of the data take no part, or not with all their rows.
    """

    loaded: LoadedRecipe
    clients: dict[str, ClientRows]
    notes: tuple[str, ...] = ()


def preflight(loaded: LoadedRecipe, *, to_run: bool = True) -> dict[str, ClientRows]:
    """Check the files that a valid recipe names, and return every client's rows.

    The run folder is looked at only if there is to be a run.

    Raises:
        PflError: the data, the backbone or the run folder cannot be used; all that is wrong.
    """
    return _preflight(loaded, to_run=to_run).clients


def _preflight(loaded: LoadedRecipe, *, to_run: bool) -> Population:
    recipe = loaded.recipe
    folder = loaded.run_folder if to_run else None
    population, faults = _check(
        Parts(
            recipe.backbone,
            recipe.adapter,
            recipe.data,
            folder,
            recipe.runtime,
            recipe.federation,
            recipe.privacy,
            recipe.clients,
        )
    )
    if faults or population is None:
        raise as_one(faults)
    refuse_misfit_rows(recipe, population.clients)
    return population


def preflight_resume(loaded: LoadedRecipe) -> dict[str, ClientRows]:
    """Check the files of a run that has begun, and return every client's rows.

    Raises:
        PflError: the data, the backbone or the run cannot be used; all that is wrong.
    """
    recipe, faults = loaded.recipe, list[PflError]()
    clients = try_to(run_clients, loaded, faults)
    try_to(_find_backbone, recipe.backbone, faults)
    try_to(refuse_no_quantizer, recipe.backbone, faults)
    try_to(refuse_no_tracker, recipe.runtime, faults)
    try_to(refuse_many_threads, recipe.runtime, faults)
    try_to(refuse_no_opacus, recipe.privacy, faults)
    if faults or clients is None:
        raise as_one(faults)
    return clients


def refuse_occupied(folder: Path) -> None:
    """Check that a run can be written to ``folder``: nothing is in it and it can be made.

    What a process has left that was ended before its run began does not count.

    Raises:
        RunFolderError: it is a file or not empty, or the nearest folder above it is not writable.
    """
    other = "choose another `name` or `runtime.output_dir`"
    try:
        if folder.is_dir() and not _is_free(folder):
            raise RunFolderError(
                f"{folder}: this run folder already holds a run",
                hint=f"go on with it by `pfl-lm resume {shlex.quote(str(folder))}`; or {other}, "
                "or remove it",
            )
        above = next(each for each in (folder, *folder.parents) if each.exists())
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be used ({error.strerror})", hint=other) from None
    if not above.is_dir():
        raise RunFolderError(f"{folder}: {above} is a file, not a folder", hint=other)
    if not os.access(above, os.W_OK | os.X_OK):
        raise RunFolderError(f"{folder}: cannot be made, {above} is not writable", hint=other)


def _is_free(folder: Path) -> bool:
    there = {path.name for path in folder.iterdir()}
    if not there:
        return True
    # Lock and ledger are the first files of every run: a recipe without them is somebody's own.
    ours = bool({LOCK, LEDGER} & there) and all(NOT_BEGUN.fullmatch(name) for name in there)
    return ours and not has_begun(folder)


def check_recipe(path: Path, overrides: Sequence[str] = (), *, to_run: bool = True) -> Checked:
    """Check a recipe and the files it names, as far as each can be checked by itself.

    The run folder is looked at only if there is to be a run.

    Raises:
        PflError: anything is wrong; all of it, the recipe's own problems first.
    """
    return check_read(read_draft(path, overrides), to_run=to_run)


def check_read(draft: Draft, *, to_run: bool = True) -> Checked:
    """Check a recipe that was read, as `check_recipe` does.

    Raises:
        PflError: anything is wrong; all of it, the recipe's own problems first.
    """
    wrong: list[PflError] = []
    loaded = try_to(check_draft, draft, wrong)
    try_to(contenders, draft, wrong)
    if wrong or loaded is None:
        parts = valid_parts(draft)
        _, faults = _check(parts if to_run else replace(parts, run_folder=None))
        raise as_one([*wrong, *faults])
    population = _preflight(loaded, to_run=to_run)
    return Checked(loaded, population.clients, tuple(population.notes))


def _check(parts: Parts) -> tuple[Population | None, list[PflError]]:
    faults: list[PflError] = []
    population = try_to(read_population, parts.data, faults)
    clients = None if population is None else population.clients
    if population is not None:
        everybody = population.clients | population.held_out
        n_rows = rows_to_train(everybody)
        try_to(partial(refuse_idle_rules, n_rows=n_rows), parts.clients, faults)
    _check_cohorts(parts.federation, clients, faults)
    if (found := try_to(_find_backbone, parts.backbone, faults)) and found.is_dir():
        try_to(partial(refuse_misfit, found), parts.adapter, faults)
        _check_own_modules(found, parts, faults)
    try_to(refuse_no_quantizer, parts.backbone, faults)
    try_to(refuse_occupied, parts.run_folder, faults)
    try_to(refuse_no_tracker, parts.runtime, faults)
    try_to(refuse_many_threads, parts.runtime, faults)
    try_to(refuse_no_opacus, parts.privacy, faults)
    return population, faults


def try_to(
    check: Callable[[Part], Result], part: Part | None, faults: list[PflError]
) -> Result | None:
    """Return what a check gives, or None; what it says is wrong goes to ``faults``.

    There is nothing to check of what is None.
    """
    try:
        return None if part is None else check(part)
    except PflError as error:
        faults.append(error)
        return None


def _check_cohorts(
    options: FederationOptions | None,
    clients: Mapping[str, ClientRows] | None,
    faults: list[PflError],
) -> None:
    """Check the trace by itself if the clients are not known, the rounds if they are.

    Without the trace that the recipe names, a round is taken to reach everybody, which is the most
    that any trace could give it.
    """

    def read(options: FederationOptions) -> Trace | None:
        return None if options.availability is None else read_trace(options.availability, clients)

    def refuse(options: FederationOptions) -> None:
        if clients is not None:
            refuse_small_rounds(options, len(clients), trace)

    trace = try_to(read, options, faults)
    try_to(refuse, options, faults)


def _check_own_modules(folder: Path, parts: Parts, faults: list[PflError]) -> None:
    """Check the modules of each rule against a folder of weights."""
    for i, rule in enumerate(parts.clients or ()):
        if parts.adapter is not None and rule.target_modules is not None:
            own = parts.adapter.model_copy(update={"target_modules": rule.target_modules})
            key = f"clients[{i}].target_modules"
            try_to(partial(refuse_misfit, folder, key=key), own, faults)


def _find_backbone(backbone: BackboneOptions) -> Path | None:
    """Return the folder of weights that a run would load; None if that takes a network to know.

    Weights that are still to be converted are in none yet.
    """
    if backbone.package is not None:
        if backbone.folder is not None:
            folder = folder_path(backbone.package, backbone.folder)
            refuse_no_model(folder, "backbone.folder")
            return folder
        assert backbone.gguf_file is not None
        return converted_folder(gguf_path(backbone.package, backbone.gguf_file))
    folder = Path(backbone.model_name_or_path or "")
    if not folder.is_absolute():  # a Hub id
        return None
    refuse_no_model(folder)
    return folder


def as_one(faults: Sequence[PflError]) -> PflError:
    """Return the one error, or one that says them all."""
    if len(faults) == 1:
        return faults[0]
    return PflError("\n".join(str(fault) for fault in faults))

"""What can be checked before anything heavy is loaded or written. Torch-free.

Every check runs even if another one fails, so that a person sees all there is to mend at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pfl_lm.data.sources import read_records
from pfl_lm.data.splits import ClientRows, split_clients
from pfl_lm.errors import PflError, RecipeError
from pfl_lm.model.package import gguf_path
from pfl_lm.recipe.checks import (
    refuse_no_model,
    refuse_no_opacus,
    refuse_no_tracker,
    refuse_occupied,
)
from pfl_lm.recipe.draft import read_draft
from pfl_lm.recipe.load import LoadedRecipe, Parts, check_draft, valid_parts
from pfl_lm.recipe.sections import BackboneOptions, DataOptions

__all__ = ["Checked", "check_recipe", "preflight", "refuse_occupied"]

Part = TypeVar("Part")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Checked:
    """A recipe that is ready to run, and every client's rows, in the order of their ids."""

    loaded: LoadedRecipe
    clients: dict[str, ClientRows]


def preflight(loaded: LoadedRecipe, *, to_run: bool = True) -> dict[str, ClientRows]:
    """Check the files that a valid recipe names, and return every client's rows.

    The run folder is looked at only if there is to be a run.

    Raises:
        PflError: the data, the backbone or the run folder cannot be used; all that is wrong.
    """
    recipe = loaded.recipe
    folder = loaded.run_folder if to_run else None
    parts = Parts(recipe.backbone, recipe.data, folder, recipe.runtime, recipe.privacy)
    clients, faults = _check(parts)
    if faults or clients is None:
        raise _one(faults)
    return clients


def check_recipe(path: Path, overrides: Sequence[str] = (), *, to_run: bool = True) -> Checked:
    """Check a recipe and the files it names, as far as each can be checked by itself.

    The run folder is looked at only if there is to be a run.

    Raises:
        PflError: anything is wrong; all of it, the recipe's own problems first.
    """
    draft = read_draft(path, overrides)
    try:
        loaded = check_draft(draft)
    except RecipeError as error:
        parts = valid_parts(draft)
        _, faults = _check(parts if to_run else replace(parts, run_folder=None))
        raise _one([error, *faults]) from None
    return Checked(loaded, preflight(loaded, to_run=to_run))


def _check(parts: Parts) -> tuple[dict[str, ClientRows] | None, list[PflError]]:
    faults: list[PflError] = []
    clients = _try(_read_clients, parts.data, faults)
    _try(_find_backbone, parts.backbone, faults)
    _try(refuse_occupied, parts.run_folder, faults)
    _try(refuse_no_tracker, parts.runtime, faults)
    _try(refuse_no_opacus, parts.privacy, faults)
    return clients, faults


def _try(
    check: Callable[[Part], Result], part: Part | None, faults: list[PflError]
) -> Result | None:
    try:
        return None if part is None else check(part)
    except PflError as error:
        faults.append(error)
        return None


def _read_clients(data: DataOptions) -> dict[str, ClientRows]:
    return split_clients(read_records(data), data.validation_fraction)


def _find_backbone(backbone: BackboneOptions) -> None:
    if backbone.package is not None and backbone.gguf_file is not None:
        gguf_path(backbone.package, backbone.gguf_file)
    elif backbone.model_name_or_path is not None:
        folder = Path(backbone.model_name_or_path)
        if folder.is_absolute():  # anything else is a Hub id, which takes a network to check
            refuse_no_model(folder)


def _one(faults: Sequence[PflError]) -> PflError:
    """Return the one error, or one that says them all."""
    if len(faults) == 1:
        return faults[0]
    return PflError("\n".join(str(fault) for fault in faults))

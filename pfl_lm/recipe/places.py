"""Relative paths: from the recipe's folder if the file says them, else from the current folder."""

from __future__ import annotations

from pathlib import Path

from pfl_lm.errors import RecipeError
from pfl_lm.recipe.draft import Draft
from pfl_lm.recipe.sections import (
    BackboneOptions,
    DataOptions,
    FederationOptions,
    RuntimeOptions,
)
from pfl_lm.recipe.yaml12 import Location


def place_data(data: DataOptions, draft: Draft) -> DataOptions:
    """Return the section with ``path`` absolute."""
    path = _absolute(data.path, ("data", "path"), draft)
    return data.model_copy(update={"path": str(path)})


def place_federation(federation: FederationOptions, draft: Draft) -> FederationOptions:
    """Return the section with ``availability`` absolute, if there is one."""
    if federation.availability is None:
        return federation
    path = _absolute(federation.availability, ("federation", "availability"), draft)
    return federation.model_copy(update={"availability": str(path)})


def place_backbone(backbone: BackboneOptions, draft: Draft) -> BackboneOptions:
    """Return the section with a model folder absolute; a Hub id stays as it is.

    A folder starts with ``.``, ``/`` or ``~``, or exists where a relative path would start.
    """
    text = backbone.model_name_or_path
    if text is None:
        return backbone
    path = _absolute(text, ("backbone", "model_name_or_path"), draft)
    if not (text.startswith((".", "~")) or Path(text).is_absolute() or path.is_dir()):
        return backbone
    return backbone.model_copy(update={"model_name_or_path": str(path)})


def place_runtime(runtime: RuntimeOptions, draft: Draft) -> RuntimeOptions:
    """Return the section with ``output_dir`` absolute."""
    path = _absolute(runtime.output_dir, ("runtime", "output_dir"), draft)
    return runtime.model_copy(update={"output_dir": str(path)})


def _absolute(text: str, at: Location, draft: Draft) -> Path:
    in_file = at in draft.lines and draft.override_of(at) is None
    base = draft.path.absolute().parent if in_file else Path.cwd()
    try:
        path = base / Path(text).expanduser()
        if ".." not in path.parts:
            return path
        # A link is kept by its own name: what it is called may say what format it has.
        return path.resolve() if path.name == ".." else path.parent.resolve() / path.name
    except (OSError, RuntimeError) as error:
        key = ".".join(str(part) for part in at)
        raise RecipeError(f"{draft.path}: {key}: no such path {text!r} ({error})") from None

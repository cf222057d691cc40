"""Relative paths: from the recipe's folder if the file says them, else from the current folder."""

from __future__ import annotations

from pathlib import Path

from pfl_lm.errors import RecipeError
from pfl_lm.recipe.data import DataOptions
from pfl_lm.recipe.draft import Draft
from pfl_lm.recipe.scalars import brief
from pfl_lm.recipe.sections import (
    BackboneOptions,
    FederationOptions,
    RuntimeOptions,
)
from pfl_lm.recipe.yaml12 import Location

_LONGEST = 4096
_LONGEST_SHOWN = 200


def place_data(data: DataOptions, draft: Draft) -> DataOptions:
    """Return the section with ``path`` absolute, if there is one."""
    if data.path is None:
        return data
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
    if not (text.startswith((".", "~")) or Path(text).is_absolute() or _is_folder(path)):
        return backbone
    return backbone.model_copy(update={"model_name_or_path": str(path)})


def place_runtime(runtime: RuntimeOptions, draft: Draft) -> RuntimeOptions:
    """Return the section with ``output_dir`` absolute."""
    path = _absolute(runtime.output_dir, ("runtime", "output_dir"), draft)
    return runtime.model_copy(update={"output_dir": str(path)})


def _absolute(text: str, at: Location, draft: Draft) -> Path:
    in_file = at in draft.lines and draft.override_of(at) is None
    try:
        base = draft.path.absolute().parent if in_file else Path.cwd()
        path = base / Path(text).expanduser()
        if ".." in path.parts:
            # A link is kept by its own name: what it is called may say what format it has.
            path = path.resolve() if path.name == ".." else path.parent.resolve() / path.name
        fault = _fault(path)
    except (OSError, RuntimeError) as error:
        fault = str(error)
    if fault is not None:
        key = ".".join(str(part) for part in at)
        said = brief(repr(text), _LONGEST_SHOWN)
        raise RecipeError(f"{draft.path}: {key}: no such path {said} ({fault})")
    return path


def _fault(path: Path) -> str | None:
    """Say why a path cannot stand in the resolved recipe, or name nothing anywhere."""
    try:
        n_bytes = len(str(path).encode())
    except UnicodeEncodeError:
        return "its folder has a name that is not UTF-8"
    return None if n_bytes < _LONGEST else f"{n_bytes} bytes, and a path has less than {_LONGEST}"


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a part of it is too long for a name, or may not be looked into
        return False

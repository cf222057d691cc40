"""The recipes that come with pfl-lm, in the package or beside a checkout's. Torch-free."""

from __future__ import annotations

from pathlib import Path

import pfl_lm
from pfl_lm.errors import PflError
from pfl_lm.recipe.nearest import nearest


def shipped_folder() -> Path:
    """Return the folder of the recipes that come with pfl-lm.

    Raises:
        PflError: this installation has none.
    """
    package = Path(pfl_lm.__file__).parent
    for folder in (package / "_recipes", package.parent / "recipes"):
        if any(folder.glob("*.yaml")):
            return folder
    raise PflError(
        "this installation of pfl-lm has no recipes",
        hint="install it anew, or write one: docs/recipes.md has every key",
    )


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the recipes that come with pfl-lm, by their names, sorted.

    Raises:
        PflError: this installation has none.
    """
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def shipped(name: str) -> Path:
    """Return the file of a recipe that comes with pfl-lm.

    Raises:
        PflError: there is no such recipe.
    """
    recipes = shipped_recipes()
    name = name.removesuffix(".yaml")
    if name not in recipes:
        meant = nearest(name, recipes)
        raise PflError(
            f"no recipe {name!r} comes with pfl-lm",
            hint=f"did you mean {meant}?" if meant else f"there are {', '.join(recipes)}",
        )
    return recipes[name]


def about(path: Path) -> str:
    """Return what a recipe says of itself in its first line."""
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    return first.removeprefix("#").strip()

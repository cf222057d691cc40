"""``pfl-lm recipes``: those that come with pfl-lm, and copies of them to change."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import typer

from pfl_lm.cli.exits import plain
from pfl_lm.errors import PflError
from pfl_lm.files import write_atomically
from pfl_lm.recipe import load_recipe
from pfl_lm.recipe.shipped import about, shipped, shipped_recipes

MAKER = "make.py"
"""The script beside a recipe that makes its rows, if they do not come with it."""


def list_recipes() -> None:
    """Print the recipes that come with pfl-lm, and what each says of itself.

    Raises:
        PflError: this installation has none.
    """
    recipes = shipped_recipes()
    width = max(map(len, recipes))
    for name, path in recipes.items():
        typer.echo(f"{name:<{width}}  {about(path)}")
    typer.echo(f"Next: pfl-lm recipes copy {next(iter(recipes))}")


def copy(name: str, folder: Path) -> None:
    """Copy a recipe, and the data that lie beside it, into a folder.

    Raises:
        PflError: there is no such recipe, or another file stands in the way; then nothing is
            written.
    """
    path = shipped(name)
    files = {folder / source.relative_to(path.parent): source for source in _files(path)}
    for target, source in files.items():
        _refuse_other(target, source)
    for target, source in files.items():
        if not target.exists():
            write_atomically(target, source.read_bytes())
        typer.echo(plain(f"{target}"))
    for target in files:
        if target.name == MAKER:
            typer.echo(plain(f"First: {shlex.join(['python', str(target)])}"))
    command = shlex.join(["pfl-lm", "validate", str(folder / path.name)])
    typer.echo(plain(f"Next: {command}"))


def _files(recipe: Path) -> Iterator[Path]:
    """Yield a recipe's file, and every file of the folder beside it that its data are in."""
    yield recipe
    path = load_recipe(recipe).recipe.data.path
    if path is None:
        return
    data = Path(path)
    if data.is_relative_to(recipe.parent):
        top = recipe.parent / data.relative_to(recipe.parent).parts[0]
        yield from sorted(path for path in top.rglob("*") if path.is_file())


def _refuse_other(target: Path, source: Path) -> None:
    try:
        same = not target.exists() or target.read_bytes() == source.read_bytes()
    except OSError as error:
        raise PflError(f"{target}: cannot be read ({error.strerror})") from None
    if not same:
        raise PflError(
            f"{target} is there already, and is another file",
            hint="name another folder, or move that file away",
        )

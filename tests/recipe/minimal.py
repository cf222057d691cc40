"""The smallest recipe, and how the tests load a variation of it."""

from __future__ import annotations

from pathlib import Path

from pfl_lm.recipe import LoadedRecipe, load_recipe

HEAD = """\
name: small
backbone: {model_name_or_path: org/tiny}
data: {path: clients.jsonl}
federation: {rounds: 2}
training: {learning_rate: 1.0, max_steps: 3}
"""
PFLALIGN = "method: {name: pflalign}\n"
MINIMAL = HEAD + PFLALIGN


def write(folder: Path, text: str = MINIMAL) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode())
    return path


def load(folder: Path, *overrides: str, text: str = MINIMAL) -> LoadedRecipe:
    return load_recipe(write(folder, text), overrides)

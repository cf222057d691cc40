"""The resolved recipe as a card shows it: no paths, no text about the data, no client's id."""

from __future__ import annotations

from collections.abc import Set
from pathlib import PureWindowsPath
from typing import Literal, get_origin

from pfl_lm.recipe.options import Options
from pfl_lm.recipe.schema import Recipe
from pfl_lm.recipe.write import write_yaml

HIDDEN = "(not shown)"
_PRIVATE_SECTIONS = ("data", "runtime")


def shown_recipe(recipe: Recipe, clients: Set[str]) -> str:
    """Return the recipe as YAML that anyone may read.

    Of ``data`` and ``runtime`` only numbers and fixed choices are shown, so that an option added
    later is hidden until somebody decides otherwise. ``runtime.diagnostics`` is not: with it every
    exported byte stays as it is.
    """
    sections = recipe.run_options()
    for name in _PRIVATE_SECTIONS:
        sections[name] = _without_text(getattr(recipe, name))
    sections["runtime"].pop("diagnostics")
    for rule in sections["clients"]:  # a pattern tells of ids too
        rule["match"] = {k: HIDDEN if k == "ids" else v for k, v in rule["match"].items()}
    shown = {key: _without_names(value, clients) for key, value in sections.items()}
    return write_yaml(shown)


def _without_text(options: Options) -> dict[str, object]:
    fields = type(options).model_fields
    shown: dict[str, object] = {}
    for key, value in options.model_dump(mode="python").items():
        chosen = get_origin(fields[key].annotation) is Literal
        plain = not value or isinstance(value, bool | int | float)
        shown[key] = value if plain or chosen else HIDDEN
    return shown


def _without_names(value: object, clients: Set[str], *, one_of_many: bool = False) -> object:
    """Return a value with each path, and each client's id in a list or as a key, hidden."""
    if isinstance(value, dict):
        if not clients.isdisjoint(value):
            return HIDDEN
        return {key: _without_names(item, clients) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_names(item, clients, one_of_many=True) for item in value]
    if isinstance(value, str) and (_is_path(value) or (one_of_many and value in clients)):
        return HIDDEN
    return value


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", ".", "\\")) or PureWindowsPath(text).drive != ""

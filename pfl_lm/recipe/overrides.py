"""Overrides from the command line: ``a.b=c``, the value read by the same YAML rules as the file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from pfl_lm.errors import RecipeError, listed
from pfl_lm.recipe.scalars import Value, brief, show
from pfl_lm.recipe.yaml12 import Location, parse_scalar_or_flow

_LONGEST = 200


@dataclass(frozen=True)
class Override:
    """One ``key.sub=value``: where it goes, what it sets, and how it was typed."""

    at: Location
    value: Value
    text: str

    @property
    def said(self) -> str:
        """The override as messages name it."""
        return _said(self.text)


def parse_overrides(texts: Sequence[str], where: str) -> tuple[Override, ...]:
    """Read every override.

    Args:
        texts: what was typed, for example ``training.learning_rate=1e-3``.
        where: what to call the recipe in messages.

    Raises:
        RecipeError: one has no ``=``, an empty key or no YAML value, or two set the same thing.
    """
    overrides: list[Override] = []
    problems: list[str] = []
    for text in texts:
        parsed = _parse(text)
        if isinstance(parsed, str):
            problems.append(f"{_said(text)}: {parsed}")
            continue
        if other := next((each for each in overrides if _overlap(each.at, parsed.at)), None):
            same = brief(other.text, _LONGEST)
            problems.append(f"{_said(text)}: `{same}` sets the same key already")
        overrides.append(parsed)
    if problems:
        raise RecipeError(
            listed(where, problems), hint="write overrides as section.key=value, each key once"
        )
    return tuple(overrides)


def apply_overrides(
    data: dict[str, Value], overrides: Sequence[Override], where: str
) -> dict[str, Value]:
    """Return a copy of ``data`` with every override set; mappings on the way are made.

    Raises:
        RecipeError: an override goes beneath something that is not a mapping.
    """
    merged = copy.deepcopy(data)
    problems = [said for each in overrides if (said := _set(merged, each))]
    if problems:
        raise RecipeError(listed(where, problems))
    return merged


def _parse(text: str) -> Override | str:
    key, equals, value = text.partition("=")
    if not equals:
        return "expected key=value"
    parts = key.split(".")
    if any(not part or part != part.strip() for part in parts):
        return f"the key {show(key)} is not of the form section.key"
    try:
        return Override(tuple(parts), parse_scalar_or_flow(value), text)
    except ValueError as error:
        return f"{error}"


def _said(text: str) -> str:
    option = text.startswith("--")  # which stands for an override
    return f"{'' if option else 'override '}{brief(text, _LONGEST)}"


def _overlap(one: Location, other: Location) -> bool:
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


def _set(data: dict[str, Value], override: Override) -> str | None:
    """Set one override in place, or say why it cannot be."""
    *above, last = (str(part) for part in override.at)
    for depth, part in enumerate(above, start=1):
        beneath = data.get(part)
        if beneath is None:
            beneath = data[part] = {}
        if not isinstance(beneath, dict):
            name = brief(".".join(above[:depth]))
            return f"{override.said}: nothing can be set beneath `{name}` ({show(beneath)})"
        data = beneath
    data[last] = override.value
    return None

"""From pydantic's errors to lines for people: where, what is wrong, what is allowed."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple, cast, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pfl_lm.recipe.draft import Draft
from pfl_lm.recipe.methods import METHOD_OPTIONS
from pfl_lm.recipe.nearest import nearest
from pfl_lm.recipe.options import BROKEN_RULE, Options
from pfl_lm.recipe.scalars import brief, show
from pfl_lm.recipe.suggest import owners, section_class, suggest_key
from pfl_lm.recipe.yaml12 import Location

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list such as [a, b]",
}
_OUT_OF_RANGE = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "finite_number",
}


class _Place(NamedTuple):
    """Where an error is: the keys that lead there, and the method whose option it would be."""

    at: Location
    method: str | None

    @property
    def section(self) -> str:
        return _section(self.at)

    @property
    def key(self) -> str:
        return str(self.at[-1])

    @property
    def field(self) -> FieldInfo | None:
        at = self.at
        while at and (isinstance(at[-1], int) or (len(at) > 2 and self._options(at) is None)):
            at = at[:-1]  # an item of a list, or within a value that is no section
        options = self._options(at) if at else None
        return options.model_fields.get(str(at[-1])) if options else None

    def _options(self, at: Location) -> type[Options] | None:
        return section_class(_section(at), self.method)


def explain(error: ValidationError, draft: Draft) -> list[str]:
    """Return one line for each problem: those of the file by line, then those of the overrides."""
    lines: dict[str, tuple[int, int]] = {}
    for details in error.errors(include_url=False):
        place = _place(details)
        line, said = _placed(place, _said(details, place), draft)
        lines.setdefault(line, said)
    return sorted(lines, key=lambda line: lines[line])


def _place(details: ErrorDetails) -> _Place:
    at, method = tuple(details["loc"]), None
    if at[:1] == ("method",) and len(at) > 1:  # pydantic names the chosen class here
        at, method = ("method", *at[2:]), str(at[1])
    at = (*at, *details.get("ctx", {}).get("at", ()))
    if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
        at = (*at, "name")
    return _Place(at, method)


def _placed(place: _Place, said: str, draft: Draft) -> tuple[str, tuple[int, int]]:
    """Return the whole line and its rank: by line, then without one, then by override."""
    name = _dotted(place.at)
    if override := draft.override_of(place.at):
        inner = "" if override.at == place.at else f"{name}: "
        return f"{override.said}: {inner}{said}", (2, draft.overrides.index(override))
    if line := draft.line_of(place.at):
        return f"line {line}  {name}: {said}", (0, line)
    return f"{name}: {said}", (1, 0)


def _section(at: Location) -> str:
    """Return the section of a key, as `section_class` takes it."""
    return re.sub(r"\[\d+\]", "[]", _dotted(at[:-1]))


def _dotted(at: Location) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{brief(part)}" for part in at)
    return "".join(parts).lstrip(".")


def _said(details: ErrorDetails, place: _Place) -> str:
    kind, value = details["type"], details["input"]
    if kind == BROKEN_RULE:
        return details["msg"]
    if kind == "extra_forbidden":
        return _unknown_key(place)
    if kind in ("missing", "union_tag_not_found"):
        return _missing(place)
    if kind == "union_tag_invalid":
        return _unknown_method(cast("dict[str, object]", value).get("name"))
    if kind == "literal_error":
        return _not_a_choice(place, value)
    if kind in _OUT_OF_RANGE:
        noun = "a finite number" if kind == "finite_number" else _noun(place)
        return f"must be {noun}{_limits(place, details)}, got {show(value)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return _not_a_section(place, value)
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    if kind in _EXPECTED:
        quotes = kind == "string_type" and isinstance(value, int | float)
        advice = "; put it in quotes" if quotes else ""
        return f"expected {_EXPECTED[kind]}, got {show(value)}{advice}"
    return f"{details['msg'][:1].lower()}{details['msg'][1:]}, got {show(value)}"


def _unknown_key(place: _Place) -> str:
    if place.section == "method" and (has := owners(place.key)):
        return f"`{place.key}` is an option of {_and(has)}, not of {place.method}"
    if "." in place.key:
        *_, name = place.key.split(".")
        return f"unknown key. Nest it: `{brief(name)}:` on a line of its own under its section"
    if meant := suggest_key(place.section, place.key, place.method):
        return f"unknown key. Did you mean `{meant}`?"
    options = section_class(place.section, place.method)
    keys = ", ".join(options.model_fields) if options else ""
    owner = f"`{place.section}`" if place.section else "a recipe"
    return f"unknown key. Keys of {owner}: {keys}"


def _and(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _missing(place: _Place) -> str:
    if place.at == ("method", "name"):
        return f"missing. Add one of {', '.join(METHOD_OPTIONS)}, for example `name: pflalign`"
    return f"missing. Add it, for example `{place.key}: {_example(place)}`"


def _example(place: _Place) -> str:
    field = place.field
    example = field.examples[0] if field and field.examples else "..."
    if not isinstance(example, dict):
        return f"{example}"
    pairs = (f"{key}: {item}" for key, item in example.items())
    return f"{{{', '.join(pairs)}}}"


def _unknown_method(name: object) -> str:
    meant = nearest(name, METHOD_OPTIONS)
    advice = f" Did you mean `{meant}`?" if meant else ""
    return f"must be one of {', '.join(METHOD_OPTIONS)}, got {show(name)}.{advice}".removesuffix(
        "."
    )


def _not_a_choice(place: _Place, value: object) -> str:
    choices = _choices(place.field.annotation) if place.field else []
    meant = nearest(value, choices) if isinstance(value, str) else None
    advice = f". Did you mean `{meant}`?" if meant else ""
    return f"must be one of {', '.join(choices)}, got {show(value)}{advice}"


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _not_a_section(place: _Place, value: object) -> str:
    got = "is empty; expected" if value is None else f"got {show(value)}, expected"
    return f"{got} a mapping such as `{place.key}: {_example(place)}`"


def _noun(place: _Place) -> str:
    whole = place.field is not None and int in _types(place.field.annotation)
    return "a whole number" if whole else "a number"


def _types(annotation: Any) -> list[Any]:
    """Return what a type is made of, the types of a list's items among it."""
    return [annotation, *(each for part in get_args(annotation) for each in _types(part))]


def _limits(place: _Place, details: ErrorDetails) -> str:
    """Say every limit of the field, not only the one that was crossed first."""
    found: dict[str, Any] = {}
    item = isinstance(place.at[-1], int)
    for limit in () if item or place.field is None else place.field.metadata:
        found |= {
            key: getattr(limit, key) for key in ("gt", "ge", "lt", "le") if hasattr(limit, key)
        }
    found = found or {
        k: v for k, v in details.get("ctx", {}).items() if k in ("gt", "ge", "lt", "le")
    }
    if "ge" in found and "le" in found:
        return f" from {found['ge']} to {found['le']}"
    said = {"gt": "greater than", "ge": "of at least", "lt": "less than", "le": "at most"}
    parts = [f"{words} {found[key]}" for key, words in said.items() if key in found]
    return f" {' and '.join(parts)}" if parts else ""

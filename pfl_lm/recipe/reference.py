"""``docs/recipes.md``, the page of every key, written from the schema. Torch-free.

python -m pfl_lm.recipe.reference > docs/recipes.md
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pfl_lm.recipe.methods import METHOD_OPTIONS, PRESETS
from pfl_lm.recipe.options import Options
from pfl_lm.recipe.schema import Recipe
from pfl_lm.recipe.suggest import section_class, subsections

Schema = Mapping[str, Any]

_HEAD = """\
# Recipes

<!-- Written from the schema: `python -m pfl_lm.recipe.reference > docs/recipes.md` -->

A recipe is one YAML 1.2 file. A key that is not on this page is an error, and so is a value of
another type: `"3"` is text, `3` and `1e-4` are numbers, `yes` is text. A relative path starts at
the recipe's folder. Any key can be changed on the command line, `pfl-lm finetune recipe.yaml
training.max_steps=20 adapter.r=16`, where a relative path starts at the current folder.

`pfl-lm validate recipe.yaml` checks a recipe and all it names, and writes nothing. The run folder
holds `recipe.resolved.yaml`, with every default filled in: a recipe itself. A key without a
default has to be given; `null` stands for not set.
"""
_TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "object": "mapping",
}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def reference() -> str:
    """Return the page: every section, key, type, limit, default and description."""
    return "\n".join(_page())


def _page() -> Iterator[str]:
    yield _HEAD
    yield "## A recipe\n"
    yield from _table(Recipe, "")
    for section in Recipe.model_fields:
        if section == "method":
            yield from _methods()
        elif section_class(section) or subsections(section):
            yield f"## {section}\n"
            if options := section_class(section):
                yield from _section(options, section)
            else:
                yield f"{Recipe.model_fields[section].description}\n"
            for name, inner in subsections(section).items():
                yield f"### {name}\n"
                yield from _section(inner, name)


def _methods() -> Iterator[str]:
    yield "## method\n"
    yield "`method.name` says which; every other key of the section is an option of that method.\n"
    for name, options in METHOD_OPTIONS.items():
        yield f"### {name}\n"
        yield from _section(options, "method")
        if "preset" in options.model_fields:
            yield "| `method.preset` | is short for |"
            yield "|---|---|"
            for preset, switches in PRESETS.items():
                meant = ", ".join(f"`{key}: {_yaml(value)}`" for key, value in switches.items())
                yield f"| `{preset}` | {meant} |"
            yield ""


def _section(options: type[Options], section: str) -> Iterator[str]:
    yield f"{inspect.cleandoc(options.__doc__ or '')}\n"
    yield from _table(options, f"{section}.")


def _table(options: type[Options], prefix: str) -> Iterator[str]:
    """Yield the lines of one section's table; the keys of a JSON Schema keep their order."""
    schema = options.model_json_schema()
    yield "| key | value | default | |"
    yield "|---|---|---|---|"
    for key, field in schema["properties"].items():
        name = f"{prefix}{key}"
        section = name == "method" or section_class(name) is not None
        value = f"[section](#{re.sub(r'[^a-z_]', '', name)})" if section else _value(field)
        default = f"`{_yaml(field['default'])}`" if "default" in field else "its own"
        if key in schema.get("required", ()):
            default = ""
        cells = (f"`{name}`", value, default, field.get("description", ""))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _value(schema: Schema) -> str:
    """Return what a value may be, for people: its type or choices, and its limits."""
    if "$ref" in schema:
        return "mapping"
    if "anyOf" in schema:
        parts = [_value(each) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(parts)
    if "const" in schema:
        return f"`{_yaml(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{_yaml(choice)}`" for choice in schema["enum"])
    if schema.get("type") == "array":
        return f"list; each {_value(schema['items'])}"
    limits = ", ".join(f"{sign} {schema[k]}" for k, sign in _LIMITS.items() if k in schema)
    return f"{_TYPES[schema['type']]} {limits}".rstrip()


def _yaml(value: object) -> str:
    """Return a value as it stands in a recipe."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return re.sub(r"e-0?", "e-", repr(value)) if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.stdout.write(reference())

"""``docs/recipes.md`` is what the schema says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pfl_lm.recipe.methods import METHOD_OPTIONS
from pfl_lm.recipe.reference import reference
from pfl_lm.recipe.schema import Recipe, json_schema
from pfl_lm.recipe.suggest import section_class

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def rows() -> dict[str, list[str]]:
    """Return the cells of every table row by its key; of a key with several, the first."""
    found: dict[str, list[str]] = {}
    for line in reference().splitlines():
        if line.startswith("| `"):
            key, *cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.setdefault(key.strip("`"), cells)
    return found


def test_the_page_is_what_the_schema_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "write it anew: python -m pfl_lm.recipe.reference > docs/recipes.md"
    )


def test_every_key_is_there() -> None:
    keys = set(Recipe.model_fields)
    for section in Recipe.model_fields:
        classes = METHOD_OPTIONS.values() if section == "method" else [section_class(section)]
        for options in classes:
            keys |= {f"{section}.{key}" for key in (options.model_fields if options else ())}
    missing = keys - rows().keys()
    assert len(keys) > 40
    assert missing == set()
    for name in METHOD_OPTIONS:
        assert f"\n### {name}\n" in reference()


@pytest.mark.parametrize(
    ("key", "value", "default", "said"),
    [
        ("name", "text", "", "Name of the run"),
        ("adapter", "[section](#adapter)", "its own", "LoRA adapter"),
        ("federation", "[section](#federation)", "", "Rounds"),
        ("adapter.r", "whole number ≥ 1, ≤ 1024", "`8`", "Rank"),
        ("adapter.lora_dropout", "number ≥ 0, < 1", "`0.0`", "Dropout"),
        ("adapter.target_modules", "list; each text", "`[q_proj, v_proj]`", "linear layers"),
        ("adapter.layers_to_transform", "list; each whole number ≥ 0", "`null`", "layers"),
        ("training.learning_rate", "number > 0, ≤ 1e+38 or `auto`", "", "Step size"),
        ("training.optimizer", "`sgd`, `adamw`", "`null`", "chosen by the method"),
        ("method.preconditioner", "`true` or `false`", "`true`", "signal-to-noise"),
        ("paper", "`eps: 1e-12`", "", ""),
    ],
)
def test_a_key_is_told_with_type_limits_and_default(
    key: str, value: str, default: str, said: str
) -> None:
    cells = [*rows()[key], "", ""]
    assert cells[:2] == [value, default]
    assert said in cells[2]


def test_editors_are_told_that_a_rate_may_be_auto() -> None:
    rate = json_schema()["$defs"]["TrainingOptions"]["properties"]["learning_rate"]
    assert {each.get("const") for each in rate["anyOf"]} == {None, "auto"}

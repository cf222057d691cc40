"""What `validate` says of the data: their format, how it is known, and from how many files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfl_lm.cli.app import app
from tests.recipe.minimal import MINIMAL, write

ASKED = {"prompt": "How many?", "completion": "So many."}
TALK = {
    "messages": [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "So many."},
    ]
}
TEXT = {"text": "There are many."}
ROWS = {"prompt_completion": ASKED, "messages": TALK, "text": TEXT}


def data_line(folder: Path, data: str) -> str:
    """Return what is said of the data of a recipe in which they are called ``data``."""
    recipe = write(folder, MINIMAL.replace("{path: clients.jsonl}", data))
    result = CliRunner().invoke(app, ["validate", str(recipe)])
    assert result.exit_code == 0, result.stderr
    [line] = [text for text in result.stdout.splitlines() if text.startswith("  data ")]
    return line.removeprefix("  data ").strip()


def rows_of(*formats: str) -> str:
    """Return four rows of one client as JSON Lines, each with the columns of all the formats."""
    columns = {key: value for format in formats for key, value in ROWS[format].items()}
    row = json.dumps({"client": "a", **columns}) + "\n"
    return "".join(row.replace("many", f"many {n}") for n in range(4))


@pytest.mark.parametrize("format", ROWS)
def test_a_format_that_was_found(tmp_path: Path, format: str) -> None:
    (tmp_path / "a.jsonl").write_text(rows_of(format))

    said = f"{format}, told by its columns, from 1 file of JSON Lines"
    assert data_line(tmp_path, "{path: a.jsonl}") == said
    assert data_line(tmp_path, "{path: a.jsonl, format: auto}") == said


@pytest.mark.parametrize("format", ROWS)
def test_a_format_that_was_given(tmp_path: Path, format: str) -> None:
    (tmp_path / "a.jsonl").write_text(rows_of(*ROWS))

    assert data_line(tmp_path, f"{{path: a.jsonl, format: {format}}}") == (
        f"{format}, as data.format says, from 1 file of JSON Lines"
    )


def test_a_folder_of_files_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "clients"
    folder.mkdir()
    for client in "abc":
        rows = ["text,n", *(f"Text {n} of {client},{n}" for n in range(4))]
        (folder / f"{client}.csv").write_text("\n".join(rows) + "\n")

    assert data_line(tmp_path, "{path: clients}") == (
        "text, told by its columns, from 3 files of CSV"
    )


@pytest.mark.parametrize(
    ("compare", "then"),
    [
        ("", ""),
        (
            "compare: {methods: [fedavg], rates: [0.1]}\n",
            ", or all it compares: pfl-lm compare {recipe}",
        ),
    ],
)
def test_what_can_be_done_next(tmp_path: Path, compare: str, then: str) -> None:
    (tmp_path / "clients.jsonl").write_text(rows_of("text"))
    recipe = write(tmp_path, MINIMAL + compare)
    result = CliRunner().invoke(app, ["validate", str(recipe)])
    next_step = f"Next: pfl-lm finetune {recipe}" + then.format(recipe=recipe)
    assert result.stdout.splitlines()[-1] == next_step

import json
import os
import subprocess
import sys
from unittest.mock import MagicMock

import pytest

from pfl_lm.data import jsonlines
from pfl_lm.data.content import PromptCompletion
from pfl_lm.data.sources import Record, read_records
from tests.data.files import ANY_FORMAT, FORMAT, GOOD, Options, no_format, problems, refusal, write


def test_rows_are_read_in_file_order_with_their_line(tmp_path):
    options = write(
        tmp_path,
        b'\xef\xbb\xbf{"client": "b", "prompt": "p1", "response": "c1", "split": "train"}\r',
        "",
        "   ",
        {"client": 7, "prompt": "p2", "completion": "c2", "split": "train", "extra": [1.5, None]},
        {"client": "b", "prompt": "Où?", "completion": "🦊\u2028", "split": "test"},
    )
    options.split_column = "split"

    assert read_records(options) == [
        Record("b", "train", PromptCompletion("p1", "c1"), 1),
        Record("7", "train", PromptCompletion("p2", "c2"), 4),
        Record("b", "test", PromptCompletion("Où?", "🦊\u2028"), 5),
    ]


def test_without_a_split_column_every_row_trains(tmp_path):
    options = write(tmp_path, GOOD | {"split": "nonsense"})
    assert read_records(options) == [Record("a", "train", PromptCompletion("p", "c"), 1)]


def test_held_out_rows_are_never_trained_on_by_oversight(tmp_path):
    options = write(tmp_path, GOOD | {"split": "train"}, GOOD | {"split": "test"})
    assert problems(options) == [
        "1 rows say in 'split' that they are held out, but no split column is named"
    ]
    assert refusal(options).hint == "set data.split_column: split, or rename that column"


def test_a_split_column_of_something_else_is_nobodys_business(tmp_path):
    options = write(tmp_path, GOOD | {"split": "banana"}, GOOD | {"split": "test"})
    assert [record.split for record in read_records(options)] == ["train", "train"]


def test_the_last_line_needs_no_newline(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD))
    assert len(read_records(Options(str(path)))) == 1


def test_a_line_longer_than_the_limit_is_skipped_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonlines, "MAX_LINE_BYTES", 2**20)
    row = json.dumps(GOOD)
    fits = row + " " * (2**20 - len(row))
    options = write(tmp_path, fits, fits + " ", GOOD, fits * 3, "[]")

    assert problems(options) == [
        "line 2: longer than 1 MiB",
        "line 4: longer than 1 MiB",
        "line 5: expected an object {...}, got an array",
    ]


def test_the_end_of_a_line_is_not_looked_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonlines, "MAX_LINE_BYTES", 2**10)
    options = write(tmp_path, "[]", " " * 2**14, "[]", " " * 2**15, "[]")

    assert problems(options) == [
        "line 1: expected an object {...}, got an array",
        "line 2: longer than 0 MiB",
        "line 3: expected an object {...}, got an array",
        "line 4: longer than 0 MiB",
    ]


def test_a_file_with_holes_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonlines, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(2**36)
    assert problems(Options(str(path))) == ["line 1: longer than 1 MiB"]


def test_the_limit_of_a_line_is_16_mib():
    assert jsonlines.MAX_LINE_BYTES == 16 * 1024 * 1024


def test_a_column_that_is_nowhere_is_reported_once(tmp_path):
    options = write(tmp_path, *[GOOD] * 30)
    options.client_column, options.split_column = "clients", "part"

    assert problems(options) == [
        "no row has the column 'clients' that data.client_column names. "
        "Columns there: 'client', 'prompt', 'completion'. Did you mean 'client'?",
        "no row has the column 'part' that data.split_column names. "
        "Columns there: 'client', 'prompt', 'completion'",
    ]
    assert refusal(options).hint == FORMAT


def test_columns_of_another_format_are_listed(tmp_path):
    row = {"client": "a", "body": "x", **{f"column_{i}": i for i in range(20)}}
    options = write(tmp_path, row, row)
    columns = ", ".join(["'client'", "'body'", *[f"'column_{i}'" for i in range(10)]])
    assert problems(options) == [no_format(f"{columns} and 10 more")]
    assert refusal(options).hint == ANY_FORMAT
    options.format = "prompt_completion"
    first, second = problems(options)
    assert first == f"no row has the column 'prompt'. Columns there: {columns} and 10 more"
    assert second.startswith("no row has the column 'completion' (or 'response'). Columns")


def test_half_a_format_is_completed(tmp_path):
    for column, other in (("prompt", "'completion' (or 'response')"), ("response", "'prompt'")):
        options = write(tmp_path, {"client": "a", column: "x"})
        assert problems(options) == [
            f"no row has the column {other}. Columns there: 'client', {column!r}"
        ]
        assert refusal(options).hint == FORMAT


def test_twenty_problems_are_listed_and_the_rest_counted(tmp_path):
    options = write(tmp_path, GOOD, *["[]"] * 23)
    lines = refusal(options).message.splitlines()
    assert lines[0] == f"{options.path}: 23 problems"
    assert lines[1] == "  line 2: expected an object {...}, got an array"
    assert lines[20] == "  line 21: expected an object {...}, got an array"
    assert lines[21:] == ["  ... and 3 more"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_no_rows_at_all(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    error = refusal(Options(str(path)))
    assert error.message == f"{path}: there are no rows in it."
    assert error.hint == ANY_FORMAT


def test_a_client_without_train_rows_is_named(tmp_path):
    rows = [("a", "train"), ("c", "test"), ("b", "validation"), ("b", "test"), ("b", "test")]
    options = write(tmp_path, *[GOOD | {"client": c, "split": s} for c, s in rows])
    options.split_column = "split"

    assert problems(options) == [
        "client 'b': no train rows, only 1 validation, 2 test",
        "client 'c': no train rows, only 1 test",
    ]
    assert refusal(options).hint == (
        "give each client train rows, or take its other rows out of the file"
    )


def test_a_missing_file(tmp_path):
    path = str(tmp_path / "nowhere.jsonl")
    assert str(refusal(Options(path))) == (
        f"data.path: there is no file {path!r}.\n"
        "  hint: a relative path is read from the recipe's folder; check the spelling"
    )


def test_an_unreadable_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pfl_lm.data.files.open_ordinary", refuse)
    path = str(tmp_path / "rows.jsonl")
    assert str(refusal(Options(path))) == (
        f"data.path: {path!r} cannot be read (Permission denied).\n"
        "  hint: check that it is a file and that you may read it"
    )


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (str(tmp_path / "pipe.jsonl"), "/dev/zero"):
        assert str(refusal(Options(path))) == (
            f"data.path: {path!r} cannot be read (not an ordinary file).\n"
            "  hint: check that it is a file and that you may read it"
        )


def test_a_path_that_is_too_long_for_one(tmp_path):
    path = str(tmp_path / ("x" * 300))
    assert refusal(Options(path)).message == (
        f"data.path: {path!r} cannot be read (File name too long)."
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_file_that_cannot_be_read_to_its_end(tmp_path, monkeypatch, name):
    def fail(*_):
        raise OSError(5, "Input/output error")

    path = tmp_path / name
    path.write_bytes(b"client,text\n")
    opened = MagicMock(readline=fail)
    opened.__enter__.return_value = opened
    opened.__exit__.return_value = None
    monkeypatch.setattr("pfl_lm.data.files.open_ordinary", lambda _: opened)
    assert "Input/output error" in refusal(Options(str(path))).message


def test_a_path_that_cannot_be_one():
    assert refusal(Options("a\0b")).message.startswith("data.path: 'a\\x00b' cannot be read (")


def test_reading_needs_no_torch():
    code = (
        "import sys, pfl_lm.data.sources, pfl_lm.data.splits\n"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

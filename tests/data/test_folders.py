"""A folder with one file for each client."""

import json
import os

import pytest

from pfl_lm.data.content import Text
from pfl_lm.data.sources import Record, read_records
from tests.data.files import Options, problems, refusal
from tests.data.test_tables import write_csv, write_parquet

HINT = (
    "a folder holds one file for each client, named for it, and nothing else; all end in .jsonl "
    "or .json, or all in .csv, or all in .parquet"
)
ROW = {"text": "x"}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "clients"
    path.mkdir()
    return path


def fill(folder, name, *rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or (ROW,)))
    return path


def test_the_files_name_is_the_client(folder):
    fill(folder, "bob.v2.jsonl", ROW, {"text": "y"})
    fill(folder, "Ünï.json")
    fill(folder, "7.JSONL")
    assert read_records(Options(str(folder))) == [
        Record("7", "train", Text("x"), 1),
        Record("bob.v2", "train", Text("x"), 1),
        Record("bob.v2", "train", Text("y"), 2),
        Record("Ünï", "train", Text("x"), 1),
    ]


def test_a_folder_of_tables(folder, tmp_path):
    write_csv(folder, "text", "x", name="a.csv")
    write_csv(folder, "text,n", "y,1", name="b.csv")
    assert [record.client for record in read_records(Options(str(folder)))] == ["a", "b"]
    other = tmp_path / "other"
    other.mkdir()
    write_parquet(other, [ROW], name="c.parquet")
    assert read_records(Options(f"{other}/")) == [Record("c", "train", Text("x"), 1, "row")]


def test_a_client_column_must_agree(folder):
    fill(folder, "alice.jsonl", ROW | {"client": "alice"}, ROW | {"client": "bob"}, ROW)
    fill(folder, "7.jsonl", ROW | {"client": 7}, ROW | {"client": "7"}, ROW | {"client": ""})
    assert problems(Options(str(folder))) == [
        "7.jsonl line 3: 'client' is empty. Each row names its client",
        "alice.jsonl line 2: 'client' is 'bob', but this file's name says 'alice'",
    ]
    assert refusal(Options(str(folder))).hint == (
        "each file is JSON Lines in UTF-8: one object a line, with `text`"
    )
    options = Options(str(folder), client_column="speaker")
    assert len(read_records(options)) == 6


def test_problems_name_the_file(folder):
    fill(folder, "a.jsonl", ROW, {"text": ""})
    fill(folder, "b.jsonl", {"txt": "x"})
    (folder / "c.jsonl").write_text("{")
    assert problems(Options(str(folder))) == [
        "a.jsonl line 2: 'text' is empty",
        "b.jsonl line 1: lacks the column 'text'. Columns there: 'txt'",
        "c.jsonl line 1: not JSON (column 2: Expecting property name enclosed in double quotes)",
    ]


def test_all_files_are_of_one_format(folder):
    fill(folder, "a.jsonl")
    fill(folder, "b.jsonl", {"prompt": "p", "completion": "c"})
    assert refusal(Options(str(folder))).message == (
        f"{folder}: the columns fit 2 formats, and a file is of one: prompt_completion "
        "('prompt', first in b.jsonl line 1) and text ('text', first in a.jsonl line 1)."
    )


def test_a_client_whose_file_is_empty_is_named(folder):
    fill(folder, "a.jsonl")
    (folder / "b.jsonl").write_text("\n")
    assert problems(Options(str(folder))) == ["b.jsonl: there are no rows in it"]


def test_no_client_without_train_rows(folder):
    fill(folder, "a.jsonl", ROW | {"split": "test"})
    assert problems(Options(str(folder), split_column="split")) == [
        "client 'a': no train rows, only 1 test"
    ]


def test_an_empty_folder(folder):
    assert problems(Options(str(folder))) == ["there are no files in it"]
    assert refusal(Options(str(folder))).hint == HINT


def test_what_does_not_belong_into_the_folder(folder, tmp_path):
    fill(folder, "fine.jsonl")
    fill(folder, ".jsonl")
    fill(folder, ".hidden.jsonl")
    fill(folder, "README.md")
    fill(folder, "noending")
    fill(folder, " .jsonl")
    fill(folder, "be\all.jsonl")
    (folder / "more").mkdir()
    (folder / "more.jsonl").mkdir()
    os.mkfifo(folder / "pipe.jsonl")
    fill(tmp_path, "away.jsonl")
    (folder / "out.jsonl").symlink_to(tmp_path / "away.jsonl")
    (folder / "up.jsonl").symlink_to("../away.jsonl")
    (folder / "nowhere.jsonl").symlink_to("gone.jsonl")
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "self.jsonl").symlink_to(".")

    endings = ".jsonl, .json, .csv, .parquet"
    assert problems(Options(str(folder))) == [
        "' .jsonl' names no client",
        "'.hidden.jsonl' is a hidden file",
        "'.jsonl' is a hidden file",
        f"'README.md' does not end in one of {endings}",
        "'be\\x07ll.jsonl' holds a control character",
        "'loop.jsonl' is a link that leads nowhere",
        "'more' is a folder",
        "'more.jsonl' is a folder",
        f"'noending' does not end in one of {endings}",
        "'nowhere.jsonl' is a link that leads nowhere",
        "'out.jsonl' is a link out of the folder",
        "'pipe.jsonl' is not a file",
        "'self.jsonl' is a folder",
        "'up.jsonl' is a link out of the folder",
    ]
    assert refusal(Options(str(folder))).hint == HINT


def test_a_name_that_is_not_utf_8(folder):
    try:
        (folder / os.fsdecode(b"a\xff.jsonl")).write_text("{}")
    except OSError:
        pytest.skip("this file system takes no such name")
    assert problems(Options(str(folder))) == ["'a\\udcff.jsonl' holds half a surrogate pair"]


def test_a_link_within_the_folder_is_a_file_like_any_other(folder):
    fill(folder, "a.jsonl")
    (folder / "b.jsonl").symlink_to("a.jsonl")
    assert [record.client for record in read_records(Options(str(folder)))] == ["a", "b"]


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    fill(folder, "a.jsonl")
    (tmp_path / "link").symlink_to(folder)
    assert len(read_records(Options(str(tmp_path / "link")))) == 1


def test_files_of_several_kinds(folder):
    fill(folder, "a.jsonl")
    fill(folder, "b.json")
    fill(folder, "c.csv")
    fill(folder, "d.parquet")
    assert problems(Options(str(folder))) == [
        "the files are of several kinds: JSON Lines ('a.jsonl'), CSV ('c.csv'), "
        "Parquet ('d.parquet')"
    ]


def test_two_files_of_one_client(folder):
    fill(folder, "a.jsonl")
    fill(folder, "a.json")
    fill(folder, "a.JSON")
    fill(folder, "A.json")
    assert problems(Options(str(folder))) == [
        "'a.JSON' and 'a.json' are both of client 'a'",
        "'a.JSON' and 'a.jsonl' are both of client 'a'",
    ]


def test_a_folder_that_may_not_be_read(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    assert str(refusal(Options(str(folder)))) == (
        f"data.path: {str(folder)!r} cannot be read (Permission denied).\n"
        "  hint: check that it is a file and that you may read it"
    )

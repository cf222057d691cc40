"""CSV and Parquet: every cell as it stands, every problem with its row."""

import csv
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from pfl_lm.data import jsonlines
from pfl_lm.data.content import Conversation, PromptCompletion, Text, Turn
from pfl_lm.data.sources import Record, read_records
from tests.data.files import Options, no_format, problems, refusal

CSV_HINT = (
    "the file is CSV in UTF-8: a header, then rows of cells set off by commas, with the client "
    "column and `text`"
)


def write_csv(folder, *rows, name="rows.csv"):
    raw = [row if isinstance(row, bytes) else row.encode() for row in rows]
    path = folder / name
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return Options(str(path))


def write_parquet(folder, rows, name="rows.parquet", **settings):
    path = folder / name
    table = pyarrow.Table.from_pylist(rows) if isinstance(rows, list) else rows
    pyarrow.parquet.write_table(table, path, **settings)
    return Options(str(path))


def test_csv_cells_are_text_and_nothing_else(tmp_path):
    options = write_csv(
        tmp_path,
        b"\xef\xbb\xbfprompt,client,completion,note\r",
        "1e3,007,NA,",
        "",
        '"a ""b"", c",null,"two\nlines\r\n",x',
        "p,007,Où? 🦊,1",
    )
    assert read_records(options) == [
        Record("007", "train", PromptCompletion("1e3", "NA"), 2, "row"),
        Record("null", "train", PromptCompletion('a "b", c', "two\nlines\r\n"), 4, "row"),
        Record("007", "train", PromptCompletion("p", "Où? 🦊"), 5, "row"),
    ]


def test_the_ending_may_be_in_capitals(tmp_path):
    assert len(read_records(write_csv(tmp_path, "client,text", "a,b", name="ROWS.CSV"))) == 1


CSVS = {
    "an empty cell": (["a,"], "row 3: 'text' is empty"),
    "too few cells": (["a"], "row 3: has 1 cell, but the header has 2"),
    "too many cells": (["a,b,c"], "row 3: has 3 cells, but the header has 2"),
    "text after a quote": (
        ['a,"b"c', "a,d"],
        "row 3: not CSV (',' expected after '\"'). What follows was not read",
    ),
    "a quote that never ends": (
        ['a,"b', "a,d"],
        "row 3: not CSV (unexpected end of data). What follows was not read",
    ),
    "not utf-8": (
        [b"a,x\xff", "a,d"],
        "row 3: not UTF-8 (byte 0xff in line 3). What follows was not read",
    ),
    "not utf-8 further down in a cell": (
        [b'a,"x\n\n\xff"', "a,d"],
        "row 3: not UTF-8 (byte 0xff in line 5). What follows was not read",
    ),
}


@pytest.mark.parametrize("case", CSVS)
def test_a_bad_row_of_csv_is_named(tmp_path, case):
    rows, expected = CSVS[case]
    options = write_csv(tmp_path, "client,text", "a,good", *rows)
    assert problems(options) == [expected]
    assert refusal(options).hint == CSV_HINT


def test_a_lone_carriage_return_ends_no_row(tmp_path):
    [problem] = problems(write_csv(tmp_path, "client,text", "a,b\rc,d"))
    assert problem.startswith("row 2: not CSV (new-line character seen in unquoted field")


def test_rows_count_as_a_spreadsheet_counts_them(tmp_path):
    options = write_csv(tmp_path, "client,text", '"a","x\ny\nz"', "", "a,", "a, ")
    assert problems(options) == ["row 4: 'text' is empty", "row 5: 'text' is empty"]


def test_a_column_twice_in_csv(tmp_path):
    options = write_csv(tmp_path, "client,text,text", "a,b,c", "a,b,c")
    assert problems(options) == ["row 1: the column 'text' is there twice"]


def test_other_separators_show_in_the_columns(tmp_path):
    assert problems(write_csv(tmp_path, "client;text", "a;b")) == [
        "no row has the column 'client' that data.client_column names. Columns there: "
        "'client;text'",
        no_format("'client;text'"),
    ]


def test_csv_cannot_hold_a_conversation(tmp_path):
    [problem] = problems(write_csv(tmp_path, "client,messages", "a,[]"))
    assert problem == "row 2: 'messages' must be an array of messages, got the string '[]'"


@pytest.mark.parametrize("rows", [(), ("client,text",)])
def test_csv_without_rows(tmp_path, rows):
    options = write_csv(tmp_path, *rows)
    assert refusal(options).message == f"{options.path}: there are no rows in it."


def test_long_cells_are_read_and_the_limit_is_put_back(tmp_path):
    before = csv.field_size_limit()
    options = write_csv(tmp_path, "client,text", "a," + "x" * (before + 1))
    assert len(read_records(options)[0].content.text) == before + 1
    assert csv.field_size_limit() == before


def test_a_line_of_csv_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonlines, "MAX_LINE_BYTES", 2**20)
    options = write_csv(tmp_path, "client,text", "a,b", "a," + "x" * 2**20)
    assert problems(options) == [
        "row 3: not CSV (a line longer than 1 MiB). What follows was not read"
    ]


def test_parquet_of_each_format(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert read_records(write_parquet(tmp_path, [{"client": 7, "messages": talk}])) == [
        Record(
            "7", "train", Conversation((Turn("user", "Hi"), Turn("assistant", "Hello"))), 1, "row"
        )
    ]
    assert read_records(write_parquet(tmp_path, [{"client": "a", "text": " x"}])) == [
        Record("a", "train", Text(" x"), 1, "row")
    ]
    rows = [{"client": "a", "prompt": f"p{i}", "response": "c"} for i in range(2500)]
    records = read_records(write_parquet(tmp_path, rows, row_group_size=700))
    assert [record.line for record in records] == list(range(1, 2501))
    assert records[-1].content == PromptCompletion("p2499", "c")


def test_a_bad_row_of_parquet_is_named(tmp_path):
    rows = [{"client": "a", "text": "x"}, {"client": None, "text": "x"}, {"client": "b"}]
    options = write_parquet(tmp_path, rows)
    assert problems(options) == [
        "row 2: 'client' must be a string or a whole number, got null",
        "row 3: 'text' must be a string, got null",
    ]
    assert refusal(options).hint == "the file is Parquet, with the client column and `text`"


def test_values_that_only_parquet_has(tmp_path):
    rows = [{"client": "a", "text": b"bytes"}, {"client": "a", "text": b"x"}]
    assert problems(write_parquet(tmp_path, rows)) == [
        "row 1: 'text' must be a string, got a bytes",
        "row 2: 'text' must be a string, got a bytes",
    ]


def test_a_parquet_message_with_less_keys_than_another(tmp_path):
    messages = [
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": "Hello", "name": "Bo"},
    ]
    assert problems(write_parquet(tmp_path, [{"client": "a", "messages": messages}])) == [
        "row 1: message 2 has 'name'. Only 'role' and 'content' are read"
    ]


def test_a_column_twice_in_parquet(tmp_path):
    text = pyarrow.array(["x"])
    table = pyarrow.Table.from_arrays([text, text, text], names=["client", "text", "text"])
    assert problems(write_parquet(tmp_path, table)) == ["row 1: the column 'text' is there twice"]


def test_what_is_no_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b'{"client": "a"}\n' * 9)
    [problem] = problems(Options(str(path)))
    assert problem.startswith("row 1: not readable as Parquet (Parquet magic bytes not found")
    assert problem.endswith("). What follows was not read")
    path.write_bytes(b"")
    assert len(problems(Options(str(path)))) == 1


def test_parquet_that_is_broken_further_on(tmp_path):
    rows = [{"client": "a", "text": str(i) * 50} for i in range(3000)]
    options = write_parquet(tmp_path, rows, row_group_size=1000, compression="none")
    path = tmp_path / "rows.parquet"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3 : len(raw) // 3 + 20000] = b"\xff" * 20000
    path.write_bytes(raw)
    assert "not readable as Parquet (" in problems(options)[-1]


def test_texts_of_parquet_that_are_not_utf_8(tmp_path):
    binary = pyarrow.array([b"fine", b"\xff\xfe"])
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, binary.buffers())
    table = pyarrow.Table.from_arrays([pyarrow.array(["a", "a"]), broken], names=["client", "text"])
    [problem] = problems(write_parquet(tmp_path, table))
    assert problem.startswith("row 1: not readable as Parquet ('utf-8' codec can't decode")


def test_reading_tables_needs_no_torch(tmp_path):
    write_csv(tmp_path, "client,text", "a,b")
    write_parquet(tmp_path, [{"client": "a", "text": "b"}])
    code = (
        "import sys\n"
        "from pfl_lm.data.sources import read_records\n"
        "from pfl_lm.recipe.data import DataOptions\n"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'pandas'}\n"
        "read_records(DataOptions(path='rows.csv'))\n"
        "assert not {*heavy, 'pyarrow'} & set(sys.modules)\n"
        "read_records(DataOptions(path='rows.parquet'))\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)

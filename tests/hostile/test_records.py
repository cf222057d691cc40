"""Rows of strangers in every kind of file, through `pfl-lm validate`."""

from __future__ import annotations

import copy
import csv
import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile.hostile import NAMES, names, values, workplace
from tests.hostile.watched import Watched, examples, report
from tests.tiny import client_rows, tiny_recipe

ROWS = client_rows(("alice", "bob"), n_rows=4)
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
TALKS = [{"client": row["client"], "split": row["split"], "messages": TALK} for row in ROWS]
TEXTS = [{"client": row["client"], "split": row["split"], "text": row["prompt"]} for row in ROWS]
KEYS = ["client", "split", "prompt", "completion", "response", "messages", "text", "group"]

Rows = list[dict[str, Any]]
Change = Callable[[Rows], None]


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A folder with a recipe, which is the current folder too; its data come with each run."""
    work = workplace(tmp_path)
    (tmp_path / "outside").write_text("outside")
    changes = {"data.path": "rows", "backbone.model_name_or_path": "./model"}
    tiny_recipe(work, **{**changes, "runtime.output_dir": "runs"})
    monkeypatch.chdir(work)
    return Watched(tmp_path)


def read(watched: Watched, content: bytes, ending: str) -> None:
    """Have a file of rows read, which is gone afterwards; what is wrong has a place."""
    path = Path(f"rows{ending}")
    path.write_bytes(content)
    code, _, said = watched.run("validate", "recipe.yaml", f"data.path={path}")
    path.unlink()
    if code == 2:
        assert "line " in said or "row " in said or "client " in said or "column" in said, said
        assert str(path) in said or said.startswith("data"), said


def _cell(i: int, key: str, value: Any) -> Change:
    def change(rows: Rows) -> None:
        rows[i % len(rows)][key] = value

    return change


def _every(key: str, value: Any) -> Change:
    def change(rows: Rows) -> None:
        for row in rows:
            row[key] = value

    return change


def _drop(i: int, key: str) -> Change:
    def change(rows: Rows) -> None:
        rows[i % len(rows)].pop(key, None)

    return change


def _message(i: int, key: str, value: Any) -> Change:
    def change(rows: Rows) -> None:
        row = rows[i % len(rows)]
        row["messages"] = [*TALK[:1], {**TALK[1], key: value}]

    return change


def tables(deepest: int = 2000) -> st.SearchStrategy[tuple[Rows, list[Change]]]:
    """Return rows and what to change in them."""
    places = st.integers(0, 7)
    keys = st.sampled_from(KEYS) | names
    anything = values(deepest)
    changes = st.one_of(
        st.builds(_cell, places, st.just("client"), st.sampled_from(NAMES)),
        st.builds(_cell, places, keys, anything),
        st.builds(_every, st.sampled_from(KEYS), names | anything),
        st.builds(_drop, places, st.sampled_from(KEYS)),
        st.builds(_message, places, st.sampled_from(["role", "content"]) | names, anything),
    )
    rows = st.sampled_from([ROWS, TALKS, TEXTS]).map(copy.deepcopy)
    return st.tuples(rows, st.lists(changes, max_size=2))


def changed(table: tuple[Rows, list[Change]]) -> Rows:
    rows, made = table
    for change in made:
        change(rows)
    return rows


SNIPPETS = [
    *(b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b"\x85", b"\x1b[2J"),
    *("\u2028".encode(), "\u202e".encode(), b'"', b"'", b",", b";", b"\t", b"\\", b"{", b"}", b"["),
    *(b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 5000, b"\\ud800", b"\\u0000", b"[" * 5000),
    *(
        b'{"a":' * 5000,
        b'"client":"x",',
        b'"' + b"x" * 100_000,
        b"," * 50_000,
        b"null",
        b"/*",
        b"#",
    ),
]
some_cuts = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 60), st.sampled_from(SNIPPETS) | st.binary()),
    min_size=1,
    max_size=3,
)
cuts = st.just([]) | some_cuts


def cut(content: bytes, made: list[tuple[int, int, bytes]]) -> bytes:
    for at, length, snippet in made:
        at %= len(content) + 1
        content = content[:at] + snippet + content[at + length :]
    return content


def test_json_lines(records: Watched) -> None:
    @examples(150)
    @given(tables(), cuts, st.booleans(), st.sampled_from([".jsonl", ".json", "", ".txt"]))
    def check(table: Any, made: Any, ascii_only: bool, ending: str) -> None:
        rows = changed(table)
        try:
            lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        except RecursionError:
            return
        read(records, cut("\n".join(lines).encode("utf-8", "surrogatepass"), made), ending)

    check()
    report(records, 120)


def test_every_id_by_itself_and_all_together(records: Watched) -> None:
    fine = []
    for name in NAMES:
        rows = [{**row, "client": name} for row in ROWS]
        before = records.refused
        read(records, json.dumps(rows)[1:-1].replace("}, {", "}\n{").encode(), ".jsonl")
        fine += rows if records.refused == before else []
    assert records.refused == sum(map(unfit, NAMES))

    read(records, "\n".join(map(json.dumps, fine)).encode(), ".jsonl")

    assert records.refused == sum(map(unfit, NAMES))
    report(records, len(NAMES))


def unfit(name: str) -> bool:
    """Say whether a client cannot be called this: nothing to be seen, or nothing to be shown."""
    return not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs") for c in name)


def test_csv(records: Watched) -> None:
    @examples(120)
    @given(tables(), cuts)
    def check(table: Any, made: Any) -> None:
        rows = changed(table)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        try:
            writer.writerows(rows)
        except RecursionError:
            return
        read(records, cut(text.getvalue().encode("utf-8", "surrogatepass"), made), ".csv")

    check()
    report(records, 90)


def parquet(rows: Rows, **settings: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, **settings)
    return file.getvalue()


def test_parquet(records: Watched) -> None:
    settings = [
        *({}, {"compression": "none"}, {"compression": "zstd", "use_dictionary": False}),
        *({"row_group_size": 3}, {"data_page_version": "2.0"}, {"version": "1.0"}),
    ]
    files = [parquet(rows, **how) for rows in (ROWS, TALKS, TEXTS) for how in settings]
    bits = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 7)), min_size=1, max_size=4)

    def flipped(content: bytes, made: list[tuple[int, int]]) -> bytes:
        raw = bytearray(content)
        for at, bit in made:
            raw[-1 - at % len(raw)] ^= 1 << bit
        return bytes(raw)

    @examples(150)
    @given(
        st.builds(flipped, st.sampled_from(files), bits)
        | st.builds(cut, st.sampled_from(files), some_cuts)
    )
    def check(content: bytes) -> None:
        read(records, content, ".parquet")

    check()
    report(records, 100)


def test_parquet_of_other_types(records: Watched) -> None:
    @examples(80)
    @given(tables(deepest=20))
    def check(table: Any) -> None:
        try:
            content = parquet(changed(table))
        except (pyarrow.ArrowException, ValueError, OverflowError, TypeError, RecursionError):
            return  # what cannot be written
        read(records, content, ".parquet")

    check()
    report(records, 20)


GOOD = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
MIB = 2**20
LARGE = {
    "a line of 40 MiB": (GOOD + b'{"client": "' + b"x" * 40 * MIB + b'"}\n' + GOOD, ".jsonl"),
    "a line of 40 MiB without an end": (GOOD + b"[" * 40 * MIB, ".jsonl"),
    "an id of 15 MiB": (GOOD + b'{"client": "' + b"x" * 15 * MIB + b'"}', ".jsonl"),
    "a split of 15 MiB": (GOOD.replace(b'"train"', b'"' + b"t" * 15 * MIB + b'"', 1), ".jsonl"),
    "a key of 15 MiB": (GOOD + b'{"' + b"x" * 15 * MIB + b'": 1}', ".jsonl"),
    "a key of 7 MiB twice": (GOOD + b'{"%s": 1, "%s": 1}' % ((b"k" * 7 * MIB,) * 2), ".jsonl"),
    "many keys": (
        GOOD + b"{" + b",".join(b'"%d":1' % i for i in range(200_000)) + b"}",
        ".jsonl",
    ),
    "nothing but lines": (b"\n" * MIB, ".jsonl"),
    "wrong lines": (b"[]\n" * 50_000, ".jsonl"),
    "deep lists": (GOOD + b'{"a": ' + b"[" * 8 * MIB, ".jsonl"),
    "lists not too deep": (GOOD + b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", ".jsonl"),
    "other keys in each row": (
        b"".join(b'{"client": "a", "spilt_%d": "train"}\n' % i for i in range(20_000)),
        ".jsonl",
    ),
    "messages": (
        b'{"client": "a", "messages": [' + b",".join([b'{"role": "gpt"}'] * 400_000) + b"]}",
        ".jsonl",
    ),
    "a cell of 40 MiB": (b"client,text\na," + b"x" * 40 * MIB, ".csv"),
    "a cell of many lines": (b'client,text\na,"' + b"x\n" * 8 * MIB + b"xx", ".csv"),
    "a header of a million columns": (b"a," * 10**6 + b"client\n" + GOOD, ".csv"),
    "a row of a million cells": (b"client,text\na,x\n" + b"," * 10**6, ".csv"),
}


@pytest.mark.parametrize("case", LARGE)
def test_large_files_are_refused_in_few_words(records: Watched, case: str) -> None:
    read(records, *LARGE[case])

    assert records.refused == 1

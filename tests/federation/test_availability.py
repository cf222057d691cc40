"""The trace of who can be reached: read strictly, all that is wrong with it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfl_lm.errors import DataError
from pfl_lm.federation.availability import Trace, read_trace

CLIENTS = ("alice", "bob", "carol", "007")
HINT = (
    "the file is CSV in UTF-8 with the columns round,client: a row for each client that can be "
    "reached in a round, and in each round from 1 to the last at least one"
)


def trace_of(folder: Path, text: str | bytes) -> Trace:
    path = folder / "trace.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_trace(str(path), CLIENTS)


@pytest.mark.parametrize(
    "text",
    [
        "round,client\n1,bob\n1,alice\n2,007\n",
        "client,round\nbob,1\n007,2\nalice,1",
        '\ufeffround,client\r\n1,"bob"\r\n\r\n2,"007"\r\n01,alice\r\n',
    ],
    ids=["plain", "in another order", "from a spreadsheet"],
)
def test_a_trace_is_read_as_it_is(tmp_path: Path, text: str) -> None:
    trace = trace_of(tmp_path, text)
    assert trace == Trace((("alice", "bob"), ("007",)))
    assert [trace.clients(round) for round in (1, 2, 3, 4, 101)] == [
        *2 * [("alice", "bob"), ("007",)],
        ("alice", "bob"),
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("x,bob\n1,alice", ["row 2: 'round' must be a whole number, got 'x'"]),
        ("1.0,bob\n1,alice", ["row 2: 'round' must be a whole number, got '1.0'"]),
        ("1,bob\n 2,alice", ["row 3: 'round' must be a whole number, got ' 2'"]),
        ("٢,bob\n1,alice", ["row 2: 'round' must be a whole number, got '٢'"]),
        ("1,bob\n,alice", ["row 3: 'round' must be a whole number, got ''"]),
        ("1,bob\n" + "9" * 5000 + ",alice", [f"got '{'9' * 56}..."]),
        ("0,bob\n1,alice", ["row 2: 'round' must be at least 1, got 0"]),
        ("-3,bob\n1,alice", ["row 2: 'round' must be at least 1, got -3"]),
        ("1,\n1,alice", ["row 2: 'client' is empty"]),
        ("1,  \n1,alice", ["row 2: 'client' is empty"]),
        (
            "1,bob\n1,alice\n1,bob\n2,bob\n01,bob",
            [
                "row 4: client 'bob' is there twice in round 1, see row 2",
                "row 6: client 'bob' is there twice in round 1, see row 2",
            ],
        ),
        ("1,alcie", ["row 2: the data have no client 'alcie'. Did you mean 'alice'?"]),
        ("1,alice\n1,zz\n2,zz\n3,zz", ["row 3: the data have no client 'zz'"]),
        ("1, bob", ["row 2: the data have no client ' bob'. Did you mean 'bob'?"]),
        ("1,7", ["row 2: the data have no client '7'"]),
        ("2,bob", ["round 1 has no row, but round 2 has"]),
        (
            "1,bob\n3,bob\n4,bob\n9,bob\n900000000000000000,bob",
            [
                "round 2 has no row, but round 3 has",
                "rounds 5 to 8 have no row, but round 9 has",
                "rounds 10 to 899999999999999999 have no row, but round 900000000000000000 has",
            ],
        ),
        ("1,bob\n1\n1,alice,x", ["row 3: has 1 cell, but", "row 4: has 3 cells, but"]),
        ('1,bob\n1,"alice', ["row 3: not CSV (unexpected end of data)"]),
        (
            "x,\n2,mallory\n2,mallory",
            [
                "row 2: 'round' must be a whole number, got 'x'",
                "row 2: 'client' is empty",
                "row 4: client 'mallory' is there twice in round 2, see row 3",
                "row 3: the data have no client 'mallory'",
                "round 1 has no row, but round 2 has",
            ],
        ),
    ],
)
def test_all_that_is_wrong_with_the_rows(tmp_path: Path, rows: str, said: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        trace_of(tmp_path, f"round,client\n{rows}\n")
    head, *lines = caught.value.message.splitlines()
    count = "1 problem" if len(said) == 1 else f"{len(said)} problems"
    assert head == f"federation.availability: {tmp_path}/trace.csv: {count}"
    assert len(lines) == len(said)
    for line, start in zip(lines, said, strict=True):
        assert start in line
    assert caught.value.hint == HINT


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there are no rows in it"),
        ("round,client\n", "there are no rows in it"),
        (
            "1,bob\n1,alice\n",
            "row 1: the columns are '1', 'bob'; must be round and client, and no other",
        ),
        (
            "round,client,available\n1,bob,0\n2,bob,1\n",
            "row 1: the columns are 'round', 'client', 'available'; must be round and client, "
            "and no other",
        ),
        ("Round,client\n1,bob\n", "row 1: the columns are 'Round', 'client'; must be"),
        ("round;client\n1;bob\n", "row 1: the columns are 'round;client'; must be"),
        ("round,round\n1,bob\n", "row 1: the column 'round' is there twice"),
        (b"round,client\n1,b\xf6b\n", "row 2: not UTF-8 (byte 0xf6 in line 2)"),
    ],
)
def test_files_that_are_no_trace(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(DataError) as caught:
        trace_of(tmp_path, text)
    _, line = caught.value.message.splitlines()
    assert line.startswith(f"  {said}")
    assert caught.value.hint == HINT


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_trace(str(tmp_path / "none.csv"), CLIENTS)
    assert str(caught.value) == (
        f"federation.availability: there is no file '{tmp_path}/none.csv'.\n"
        "  hint: a relative path is read from the recipe's folder; check the spelling"
    )
    with pytest.raises(DataError) as caught:
        read_trace(str(tmp_path), CLIENTS)
    assert str(caught.value) == (
        f"federation.availability: '{tmp_path}' cannot be read (Is a directory).\n"
        "  hint: check that it is a file and that you may read it"
    )


def test_without_clients_to_compare_with_any_will_do(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("round,client\n1,whoever\n")
    assert read_trace(f"{tmp_path}/trace.csv", None) == Trace((("whoever",),))


def test_a_flood_of_problems_is_cut(tmp_path: Path) -> None:
    text = "round,client\n" + "".join(f"1,stranger {i}\n" for i in range(5000))
    with pytest.raises(DataError) as caught:
        trace_of(tmp_path, text)
    lines = caught.value.message.splitlines()
    assert lines[0].endswith(": 5000 problems")
    assert (len(lines), lines[-1]) == (22, "  ... and 4980 more")

"""Parquet files that stand for much more than they are."""

import pyarrow
import pyarrow.parquet
import pytest

from pfl_lm.data import jsonlines, parquet
from pfl_lm.data.sources import read_records
from tests.data.files import Options, problems

TOO_MUCH = "the file holds more than 2 MiB, too much for its size. What follows was not read"
LONG = "x" * 2**16


def write(folder, columns, **settings):
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd", **settings)
    return Options(str(path))


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(parquet, "ALWAYS", 2**21)


def of_one(value, n):
    """A column in which a value comes ``n`` times and stands once."""
    indices = pyarrow.array([0] * n, pyarrow.int32())
    return pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([value]))


BOMBS = {
    "a value, compressed": ({"text": ["x" * 2**22]}, {"use_dictionary": False}),
    "a dictionary": ({"text": [LONG] * 100}, {"dictionary_pagesize_limit": 2**20}),
    "a dictionary that stays one": ({"text": of_one(LONG, 100)}, {}),
    "a dictionary in lists": (
        {
            "messages": pyarrow.ListArray.from_arrays(
                pyarrow.array(range(0, 101, 10), pyarrow.int32()), of_one(LONG, 100)
            )
        },
        {},
    ),
    "prefixes": (
        {"text": [LONG] * 100},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    ),
    "nulls": ({"text": pyarrow.nulls(100_000, pyarrow.string())}, {}),
    "nulls in a list": ({"text": [[None] * 100_000]}, {}),
    "nulls in a struct": ({"text": [{"a": [None] * 100_000}]}, {}),
    "nulls in a map": (
        {
            "text": pyarrow.array(
                [[(0, None)] * 50_000],
                pyarrow.map_(pyarrow.int32(), pyarrow.string()),
            )
        },
        {},
    ),
    "numbers": ({"text": [0] * 100_000}, {}),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_file_that_holds_too_much_is_not_read_on(tmp_path, little, case):
    columns, settings = BOMBS[case]
    n = len(next(iter(columns.values())))
    write(tmp_path, {"client": ["a"] * n, **columns}, **settings)
    path = tmp_path / "rows.parquet"
    assert 100 * path.stat().st_size < 2**22

    with path.open("rb") as file:
        rows = list(parquet.read_parquet(file))

    assert rows[-1] == (len(rows), TOO_MUCH)
    assert len(rows) < n + (n == 1)


def test_what_a_file_may_hold_grows_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ALWAYS", 0)
    columns = {"client": ["a"] * 200, "text": [f"{i} {LONG[:1000]}" for i in range(200)]}
    options = write(tmp_path, columns)
    monkeypatch.setattr(parquet, "MOST_TIMES", 1)
    assert problems(options) == [f"row 1: {TOO_MUCH.replace('2 MiB', '0 MiB')}"]
    monkeypatch.setattr(parquet, "MOST_TIMES", 1000)
    assert len(read_records(options)) == 200


def test_a_row_is_as_long_as_a_line_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonlines, "MAX_LINE_BYTES", 2**20)
    texts = ["short", "x" * 2**20, "y" * (2**20 - 1000), "short"]
    options = write(tmp_path, {"client": ["a"] * 4, "text": texts})
    assert problems(options) == ["row 2: longer than 1 MiB"]


def test_the_limits():
    assert (parquet.ALWAYS, parquet.MOST_TIMES) == (256 * 2**20, 100)


def test_dictionaries_of_numbers_are_read(tmp_path):
    numbers = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0, 0], pyarrow.int32()), pyarrow.array([7])
    )
    options = write(tmp_path, {"client": numbers, "text": ["x", "y"]})
    assert [record.client for record in read_records(options)] == ["7", "7"]

"""Parquet, read as it is, and no more of it than its size can honestly stand for.

A Parquet file of a kilobyte can stand for terabytes: pages are compressed, and a value that comes
again is a few bits. So what the file holds in all is bounded by its size, and a row as a line of
JSON is. pyarrow reads it, with which ``datasets`` reads it too; no torch here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from pfl_lm.data import jsonlines
from pfl_lm.data.jsonlines import Row
from pfl_lm.data.tables import twice
from pfl_lm.data.words import short

MOST_TIMES = 100
"""How many times its own size a file may hold."""

ALWAYS = 256 * 2**20
"""How many bytes any file may hold."""

_BYTES_AT_ONCE, _ROWS_AT_ONCE = 2**30, 64
_VALUE = 128  # bytes that a value takes in Python, however few bits it has in the file


def read_parquet(file: BinaryIO) -> Iterator[tuple[int, Row]]:
    """Yield each row and its number, from 1."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        limit = max(ALWAYS, MOST_TIMES * os.fstat(file.fileno()).st_size)
        table = pyarrow.parquet.ParquetFile(file)
        if column := twice(table.schema_arrow.names):
            yield 1, f"the column {short(column)} is there twice"
            return
        groups = _groups(table.metadata)
        if sum(groups) > limit:
            yield 1, _too_much("file", limit)
            return
        at_once = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // max([1, *groups])))
        for number, row in rows_of(table.iter_batches(batch_size=at_once), "file", limit):
            yield number, row
    except (
        *(pyarrow.ArrowException, ArithmeticError, LookupError, MemoryError, OSError),
        *(RecursionError, TypeError, ValueError),
    ) as error:
        reason = str(error).partition("\n")[0][:200]
        yield number + 1, f"not readable as Parquet ({reason}). What follows was not read"


def rows_of(batches: Iterable[Any], what: str, limit: int) -> Iterator[tuple[int, Row]]:
    """Yield the rows of record batches and their numbers, from 1, up to ``limit`` bytes in all.

    ``what`` holds them, in the words of the message that ends the rows if there are more.
    """
    number = held = 0
    for batch in batches:
        held += _weight(batch)
        if held > limit:
            yield number + 1, _too_much(what, limit)
            return
        for row in _rows(batch):
            number += 1
            yield number, row


def _too_much(what: str, limit: int) -> str:
    said = f"the {what} holds more than {limit // 2**20} MiB, too much for its size"
    return f"{said}. What follows was not read"


def _groups(metadata: Any) -> list[int]:
    """Return the size of each group of rows, as the file tells it.

    Not that of each column: to ask for one that is broken ends the process.
    """
    return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


def _rows(batch: Any) -> Iterator[Row]:
    if _weight(batch) <= jsonlines.MAX_LINE_BYTES:
        yield from batch.to_pylist()
        return
    for i in range(batch.num_rows):
        one = batch.slice(i, 1)
        if _weight(one) > jsonlines.MAX_LINE_BYTES:
            yield f"longer than {jsonlines.MAX_LINE_BYTES // 2**20} MiB"
        else:
            yield from one.to_pylist()


def _weight(batch: Any) -> int:
    """Return about how many bytes a batch takes, once it is Python's."""
    return sum(map(_weight_of, batch.columns))


def _weight_of(array: Any) -> int:
    from pyarrow import compute, types

    kind = array.type
    inside: list[Any] = []
    if types.is_struct(kind):
        inside = array.flatten()
    elif types.is_map(kind):
        inside = [array.keys, array.items]
    elif types.is_nested(kind):
        inside = [array.flatten()]
    elif types.is_dictionary(kind):  # each value of its own, as Python will have it
        if types.is_primitive(array.dictionary.type):
            return 2 * _VALUE * len(array)
        lengths = compute.binary_length(array.dictionary).take(array.indices)
        return _VALUE * len(array) + int(compute.sum(lengths).as_py() or 0)
    return _VALUE * len(array) + int(array.nbytes) + sum(map(_weight_of, inside))

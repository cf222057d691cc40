"""CSV, read strictly and as it is.

Not through ``datasets.load_dataset``: it guesses what a CSV cell means (a client ``007`` becomes 7,
a text ``NA`` nothing), copies what it reads into a cache, and is slow to import. This is Python's
own module.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from pfl_lm.data import jsonlines
from pfl_lm.data.jsonlines import BOM, Row
from pfl_lm.data.words import short


def read_csv(file: BinaryIO) -> Iterator[tuple[int, Row]]:
    """Yield each row that is not blank, and its number; the header is row 1. All cells are text."""
    limit = csv.field_size_limit(jsonlines.MAX_LINE_BYTES)
    try:
        yield from _csv_rows(file)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(file: BinaryIO) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(_text_lines(file), strict=True)
    header: list[str] = []
    number = 0
    while True:
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            where = f"byte 0x{byte:02x} in line {reader.line_num + 1}"
            yield number, f"not UTF-8 ({where}). What follows was not read"
            return
        except csv.Error as error:
            yield number, f"not CSV ({error}). What follows was not read"
            return
        if not cells:
            continue
        if header:
            yield number, _by_column(header, cells)
        elif column := twice(cells):
            yield number, f"the column {short(column)} is there twice"
            return
        else:
            header = cells


def _by_column(header: list[str], cells: list[str]) -> Row:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    count = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
    return f"has {count}, but the header has {len(header)}"


def _text_lines(file: BinaryIO) -> Iterator[str]:
    line = 0
    while raw := file.readline(jsonlines.MAX_LINE_BYTES + 1):
        line += 1
        if len(raw) > jsonlines.MAX_LINE_BYTES and not raw.endswith(b"\n"):
            raise csv.Error(f"a line longer than {jsonlines.MAX_LINE_BYTES // 2**20} MiB")
        yield (raw.removeprefix(BOM) if line == 1 else raw).decode("utf-8")


def twice(names: list[str]) -> str | None:
    """Return a name that is there more than once, if there is one."""
    return next((name for name, count in Counter(names).items() if count > 1), None)

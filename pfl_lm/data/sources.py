"""Where the examples come from: one JSON Lines file with a column that names the client.

No torch here: ``pfl-lm validate`` reads the data too. Reading finds every problem with its line,
and guesses nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pfl_lm.data.problems import Problems
from pfl_lm.data.rows import SPLITS, RowReader, Split, parse_object
from pfl_lm.errors import DataError

if TYPE_CHECKING:
    from pfl_lm.recipe.schema import DataOptions

MAX_LINE_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"
_FORMAT = (
    "the file is JSON Lines in UTF-8: one object a line, with the client column, `prompt` and "
    "`completion` (or `response`)"
)


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the data: what is asked, what is to be answered, and whose it is.

    ``line`` counts from 1 and includes blank lines.
    """

    client: str
    split: Split
    prompt: str
    completion: str
    line: int


def read_records(options: DataOptions) -> list[Record]:
    """Read every row of ``data.path`` in file order.

    Raises:
        DataError: the file cannot be read, or something in it cannot be used as it is; the message
            lists the problems with their lines.
    """
    reader = RowReader(options.client_column, options.split_column)
    problems = Problems()
    records: list[Record] = []
    with _open(options.path) as file:
        for line, raw in _lines(file):
            fields = _read_line(raw, line, reader)
            if isinstance(fields, Record):
                records.append(fields)
            else:
                for fault in fields:
                    problems.add(f"line {line}: {fault}")
    _check_columns(options.path, reader)
    problems.raise_if_any(options.path, hint=_FORMAT)
    if not records:
        raise DataError(f"{options.path}: there are no rows in it.", hint=_FORMAT)
    _check_clients(options.path, records)
    return records


def _open(name: str) -> BinaryIO:
    try:
        return Path(name).open("rb")
    except FileNotFoundError:
        message = f"data.path: there is no file {name!r}."
        hint = "a relative path is read from the recipe's folder; check the spelling"
    except IsADirectoryError:
        message = f"data.path: {name!r} is a folder."
        hint = "name one JSON Lines file inside it"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        message = f"data.path: {name!r} cannot be read ({reason})."
        hint = "check that it is a file and that you may read it"
    raise DataError(message, hint=hint)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line that is not blank, and its number; None stands for one that is too long."""
    line = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES)
            yield line, None
            continue
        if line == 1:
            raw = raw.removeprefix(_BOM)
        if raw.strip():
            yield line, raw


def _read_line(raw: bytes | None, line: int, reader: RowReader) -> Record | list[str]:
    if raw is None:
        return [f"longer than {MAX_LINE_BYTES // 2**20} MiB"]
    row = parse_object(raw)
    if isinstance(row, str):
        return [row]
    fields = reader.read(row, line)
    if isinstance(fields, list):
        return fields
    return Record(fields.client, fields.split, fields.prompt, fields.completion, line)


def _check_columns(path: str, reader: RowReader) -> None:
    """Say once, not once a line, that a column is nowhere in the file."""
    problems = Problems()
    for problem in reader.columns_no_row_has():
        problems.add(problem)
    problems.raise_if_any(path, hint=_FORMAT)
    if leak := reader.split_nobody_reads():
        problems.add(leak)
    problems.raise_if_any(path, hint="set data.split_column: split, or rename that column")


def _check_clients(path: str, records: list[Record]) -> None:
    rows: defaultdict[str, Counter[Split]] = defaultdict(Counter)
    for record in records:
        rows[record.client][record.split] += 1
    problems = Problems()
    for client, counts in sorted(rows.items()):
        if not counts["train"]:
            there = ", ".join(f"{counts[split]} {split}" for split in SPLITS if counts[split])
            problems.add(f"client {client!r}: no train rows, only {there}")
    problems.raise_if_any(
        path, hint="give each client train rows, or take its other rows out of the file"
    )

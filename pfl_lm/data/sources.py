"""Where the examples come from: a file, a folder of files, a package, or the Hub.

No torch here: ``pfl-lm validate`` reads the data too. Reading finds every problem with its place,
and guesses nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pfl_lm.data.columns import renamed
from pfl_lm.data.content import Format
from pfl_lm.data.files import JSON_LINES, KINDS, DataFile, RawRow, Source, find_files
from pfl_lm.data.formats import ANY_SAID, COLUMNS_SAID, first_column, formats_of
from pfl_lm.data.hub import HUB, hub_splits
from pfl_lm.data.packaged import packaged_file
from pfl_lm.data.partition import partitioned
from pfl_lm.data.problems import Problems
from pfl_lm.data.records import SPLITS, Record, Split
from pfl_lm.data.rows import RowReader
from pfl_lm.data.words import short
from pfl_lm.errors import DataError

if TYPE_CHECKING:
    from pfl_lm.recipe.schema import DataOptions

__all__ = ["Record", "read_records"]


def read_records(options: DataOptions, only: str | None = None) -> list[Record]:
    """Read every row of the data, in the order of the files' names and of the rows in them.

    ``only`` names the client that all rows of a file are of; they may then lack the client column.

    Raises:
        DataError: a file or dataset cannot be read, or something in it cannot be used as it is;
            the message lists the problems with their places.
    """
    path = options.source
    files = find_sources(options)
    if options.partition is not None and files[0].client is not None:
        raise DataError(
            f"{path}: a folder has a file for each client already, and data.partition makes others",
            hint="leave data.partition out, or put the rows into one file",
        )
    if only is not None:
        files = [replace(file, client=only) for file in files if isinstance(file, DataFile)]
    rows = renamed(path, [row for file in files for row in file.rows()], options.columns)
    format = _detect(path, rows) if options.format == "auto" else options.format
    hint = _what_is_read(files, format)
    reader = RowReader(options, format)
    problems = Problems()
    records: list[Record] = []
    for row in rows:
        record = [row.columns] if isinstance(row.columns, str) else reader.read(row, row.columns)
        if isinstance(record, Record):
            records.append(record)
        else:
            for fault in record:
                problems.add(f"{row.place}: {fault}")
    _check_columns(path, reader, hint)
    _check_empty(files, rows, problems)
    problems.raise_if_any(path, hint=hint)
    if not records:
        raise DataError(f"{path}: there are no rows in it.", hint=hint)
    if options.partition is not None:
        records = partitioned(path, records, options.partition)
    if options.min_train_samples is None:
        _check_clients(path, records)
    return records


def find_sources(options: DataOptions) -> Sequence[Source]:
    """Return what the rows of a recipe's data are read from; datasets of the Hub are read for it.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    if options.path is not None:
        return find_files(options.path)
    if options.package is not None and options.data_file is not None:
        path = packaged_file(options.package, options.data_file)
        return [DataFile(path, KINDS.get(path.suffix.lower(), JSON_LINES))]
    return hub_splits(options)


def sources_said(options: DataOptions) -> str:
    """Say what the rows of checked data are read from."""
    if options.dataset_name is not None:
        splits = list(options.dataset_splits.values())
        noun = "split" if len(splits) == 1 else "splits"
        return f"the Hub's {options.dataset_name}, {noun} {', '.join(splits)}"
    files = find_sources(options)
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    inside = "" if options.package is None else f" in the package {options.package}"
    return f"{count} of {files[0].kind.name}{inside}"


def _detect(path: str, rows: Sequence[RawRow]) -> Format | None:
    """Return the one format whose columns are there, or None.

    Raises:
        DataError: the columns of more than one are.
    """
    first_places: dict[str, str] = {}
    for row in rows:
        if not isinstance(row.columns, str) and not row.columns.keys() <= first_places.keys():
            place = row.place
            first_places |= {column: place for column in row.columns if column not in first_places}
    formats = formats_of(first_places)
    if len(formats) > 1:
        raise DataError(
            f"{path}: the columns fit {len(formats)} formats, and a file is of one: "
            f"{' and '.join(_seen(format, first_places) for format in formats)}.",
            hint=f"set data.format to the one that is meant, for example `format: {formats[0]}`",
        )
    return formats[0] if formats else None


def _seen(format: Format, first_places: Mapping[str, str]) -> str:
    column = first_column(format, first_places)
    return f"{format} ({column!r}, first in {first_places[column]})"


def _what_is_read(files: Sequence[Source], format: Format | None) -> str:
    """Say what the files should look like."""
    columns = COLUMNS_SAID[format] if format else ANY_SAID
    said = files[0].kind.said
    if files[0].client is not None:
        return f"each file is {said}, with {columns}"
    whole = said if files[0].kind is HUB else f"the file is {said}"
    return f"{whole}, with the client column{_joined(format)}{columns}"


def _joined(format: Format | None) -> str:
    if format in ("prompt_completion", "text_label"):
        return ", "
    return " and " if format else ", and with "


def _check_columns(path: str, reader: RowReader, hint: str) -> None:
    """Say once, not once a row, that a column is nowhere in the data."""
    problems = Problems()
    for problem in reader.columns_no_row_has():
        problems.add(problem)
    problems.raise_if_any(path, hint=hint)
    if leak := reader.split_nobody_reads():
        problems.add(leak)
    problems.raise_if_any(path, hint="set data.split_column: split, or rename that column")


def _check_empty(files: Sequence[Source], rows: Sequence[RawRow], problems: Problems) -> None:
    """Note the clients whose file holds no row, and such splits: they would be left out unseen."""
    with_rows = {row.file.called for row in rows}
    for file in files:
        if file.called is not None and file.called not in with_rows:
            problems.add(f"{file.called}: there are no rows in it")


def _check_clients(path: str, records: Sequence[Record]) -> None:
    rows: defaultdict[str, Counter[Split]] = defaultdict(Counter)
    for record in records:
        rows[record.client][record.split] += 1
    problems = Problems()
    for client, counts in sorted(rows.items()):
        if not counts["train"]:
            there = ", ".join(f"{counts[split]} {split}" for split in SPLITS if counts[split])
            problems.add(f"client {short(client)}: no train rows, only {there}")
    problems.raise_if_any(
        path, hint="give each client train rows, or take its other rows out of the file"
    )

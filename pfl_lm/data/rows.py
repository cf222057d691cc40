"""From a row's columns to a record, checked field by field.

Every check says what is wrong and what is allowed; nothing is converted but whole-number ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pfl_lm.data.cells import Cells
from pfl_lm.data.content import Content, Format, Text
from pfl_lm.data.files import RawRow
from pfl_lm.data.formats import ANY_SAID, read_content
from pfl_lm.data.records import SPLITS, Record, Split
from pfl_lm.data.words import did_you_mean, kind_of, quoted, short

if TYPE_CHECKING:
    from pfl_lm.recipe.schema import DataOptions

_SPLIT_NAMES: Mapping[str, Split] = {
    **{name: name for name in SPLITS},
    **dict.fromkeys(("valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("testing",), "test"),
}


class RowReader:
    """Checks rows, and remembers what only the whole of them can tell.

    That is: which columns no row has, and whether a client is a number here and a string there.
    """

    def __init__(self, options: DataOptions, format: Format | None) -> None:
        self._options = options
        self._format = format
        self._n_rows = 0
        self._missing: Counter[tuple[str, str]] = Counter()
        self._columns: dict[str, str] = {}
        self._clients: dict[str, tuple[type, str]] = {}
        self._mixed: set[str] = set()
        self._unread_splits: Counter[str] = Counter()

    def read(self, row: RawRow, columns: Mapping[str, object]) -> Record | list[str]:
        """Return the row as a record, or everything that is wrong with it."""
        self._n_rows += 1
        self._columns.update((column, column) for column in columns)
        unread = columns.get("split")
        if self._options.split_column is None and isinstance(unread, str):
            self._unread_splits[unread] += 1
        cells = Cells(columns)
        record = Record(
            client=self._client(row, cells),
            split=self._split(row, cells),
            content=self._content(cells),
            line=row.number,
            unit=row.file.kind.unit,
            group=self._group(cells),
            label=self._label(cells),
            format=self._format,
        )
        self._missing.update(cells.missing.items())
        return cells.faults or record

    def columns_no_row_has(self) -> list[str]:
        """Return one sentence for each column that is needed and nowhere in the data."""
        there = f"Columns there: {quoted(self._columns)}"
        sentences = [
            f"no row has {called}. {there}{did_you_mean(column, self._columns)}"
            for (column, called), count in self._missing.items()
            if count == self._n_rows
        ]
        if self._format is None and self._n_rows:
            sentences.append(
                f"no row has the columns of a format: {ANY_SAID}. {there}. "
                "data.columns can rename them"
            )
        return sentences

    def split_nobody_reads(self) -> str | None:
        """Say so if a column `split` holds held-out rows and the recipe would train on them."""
        held_out = sum(self._unread_splits[split] for split in SPLITS if split != "train")
        if not held_out or self._unread_splits.keys() - {*SPLITS}:
            return None
        return (
            f"{held_out} rows say in 'split' that they are held out, but no split column is named"
        )

    def _client(self, row: RawRow, cells: Cells) -> str:
        if self._options.partition is not None:
            return ""
        column = self._options.client_column
        if row.file.client is not None and column not in cells.columns:
            return row.file.client
        n_faults = len(cells.faults)
        client = cells.identifier(column, "client", _named(column, "client"))
        if len(cells.faults) > n_faults:
            return client
        if row.file.client is not None:
            if client != row.file.client:
                cells.faults.append(
                    f"{column!r} is {short(client)}, but this file's name says "
                    f"{short(row.file.client)}"
                )
        else:
            self._same_type(client, type(cells.columns[column]), row, cells)
        return client

    def _same_type(self, client: str, kind: type, row: RawRow, cells: Cells) -> None:
        first_kind, first_place = self._clients.setdefault(client, (kind, row.place))
        if kind is not first_kind and client not in self._mixed:
            self._mixed.add(client)
            here, there = ("a number", "a string") if kind is int else ("a string", "a number")
            cells.faults.append(
                f"client {short(client)} is {here} here but {there} in {first_place}. Keep to one"
            )

    def _split(self, row: RawRow, cells: Cells) -> Split:
        if row.file.split is not None:
            return row.file.split
        column = self._options.split_column
        if column is None or cells.lacks(column, _named(column, "split")):
            return "train"
        value = cells.columns[column]
        for split in SPLITS:
            if value == split:
                return split
        if not isinstance(value, str):
            cells.faults.append(f"{column!r} must be one of {quoted(SPLITS)}, got {kind_of(value)}")
            return "train"
        meant = did_you_mean(value.strip().lower(), _SPLIT_NAMES)
        cells.faults.append(f"{column!r} is {short(value)}, not one of {quoted(SPLITS)}{meant}")
        return "train"

    def _content(self, cells: Cells) -> Content:
        return Text("") if self._format is None else read_content(self._format, cells)

    def _group(self, cells: Cells) -> str | None:
        column = self._options.group_column
        if column is None:
            return None
        return cells.identifier(column, "group", _named(column, "group"))

    def _label(self, cells: Cells) -> str | None:
        partition = self._options.partition
        if partition is None or not partition.columns:
            return None
        called = "the column {!r} that data.partition.partition_by names"
        values = [
            cells.identifier(column, "part", called.format(column)) for column in partition.columns
        ]
        return ":".join(values)


def _named(column: str, role: str) -> str:
    return f"the column {column!r} that data.{role}_column names"

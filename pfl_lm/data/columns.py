"""Columns under other names: ``data.columns``, from the file's name to ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pfl_lm.data.files import RawRow
from pfl_lm.data.jsonlines import Row
from pfl_lm.data.problems import Problems
from pfl_lm.data.words import did_you_mean, quoted


def renamed(path: str, rows: Sequence[RawRow], names: Mapping[str, str]) -> list[RawRow]:
    """Return the rows with their columns renamed; one that would have a name twice is at fault.

    Raises:
        DataError: no row has a column that is to be renamed.
    """
    if not names:
        return list(rows)
    seen = {
        column: column for row in rows if isinstance(row.columns, dict) for column in row.columns
    }
    problems = Problems()
    for column in names:
        if seen and column not in seen:
            problems.add(
                f"no row has the column {column!r} that data.columns renames. "
                f"Columns there: {quoted(seen)}{did_you_mean(column, seen)}"
            )
    problems.raise_if_any(path, hint="data.columns says `theirs: ours`: first the file's name")
    return [replace(row, columns=_renamed(row.columns, names)) for row in rows]


def _renamed(columns: Row, names: Mapping[str, str]) -> Row:
    if isinstance(columns, str):
        return columns
    for column, name in names.items():
        if column in columns and name in columns and name not in names:
            return f"{column!r} is to be read as {name!r}, and there is a {name!r} too"
    return {names.get(column, column): value for column, value in columns.items()}

"""One row by its columns, and all that is wrong with them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

from pfl_lm.data.words import encodable, kind_of, quoted, short

MAX_IDENTIFIER = 10_000
"""The most characters of what names a client or a group."""


class Cells:
    """A row's columns. What is read from them and cannot be used is noted in ``faults``.

    ``missing`` maps the columns that were asked for and are not there to what a message calls them.
    """

    def __init__(self, columns: Mapping[str, object]) -> None:
        self.columns = columns
        self.faults: list[str] = []
        self.missing: dict[str, str] = {}

    def lacks(self, column: str, called: str | None = None) -> bool:
        """Say whether a column that the row needs is not there, and note it."""
        if column in self.columns:
            return False
        called = called or f"the column {column!r}"
        self.missing[column] = called
        self.faults.append(f"lacks {called}. Columns there: {quoted(self.columns)}")
        return True

    def text(self, column: str, called: str | None = None) -> str:
        """Return text that can be learnt from."""
        if self.lacks(column, called):
            return ""
        value = self.columns[column]
        if fault := text_fault(value):
            self.faults.append(f"{column!r} {fault}")
        return str(value)

    def identifier(self, column: str, noun: str, called: str) -> str:
        """Return what names something: a string, or a whole number as one."""
        if self.lacks(column, called):
            return ""
        value = self.columns[column]
        if isinstance(value, bool) or not isinstance(value, int | str):
            self.faults.append(
                f"{column!r} must be a string or a whole number, got {kind_of(value)}"
            )
            return ""
        name = str(value)
        if not name.strip():
            self.faults.append(f"{column!r} is empty. Each row names its {noun}")
        elif fault := identifier_fault(name):
            self.faults.append(f"{column!r} {fault} ({short(name)})")
        return name


def text_fault(value: object) -> str | None:
    """Say why a value is not text that can be learnt from, if it is not."""
    if not isinstance(value, str):
        return f"must be a string, got {kind_of(value)}"
    if not value.strip():
        return "is empty"
    return None if encodable(value) else "holds half a surrogate pair, which UTF-8 cannot encode"


def identifier_fault(name: str) -> str | None:
    """Say why a name cannot be shown to people, if it cannot."""
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        return "holds a control character"
    if len(name) > MAX_IDENTIFIER:
        return f"is longer than {MAX_IDENTIFIER} characters"
    return None if encodable(name) else "holds half a surrogate pair"

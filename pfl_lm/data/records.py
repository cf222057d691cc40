"""One row of the data, checked: whose it is, on which side of the splits, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pfl_lm.data.content import Content, Format

Split = Literal["train", "validation", "test"]
Unit = Literal["line", "row"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Record:
    """One row, of which nothing is left to doubt.

    ``line`` counts from 1 what the file consists of, its ``unit``: lines of JSON Lines, blank ones
    too; rows of CSV, of which the header is the first; rows of Parquet. Rows of a client with the
    same ``group`` belong together. ``label`` is what ``data.partition`` tells rows apart by, and
    ``format`` the one it was read in.
    """

    client: str
    split: Split
    content: Content
    line: int
    unit: Unit = "line"
    group: str | None = None
    label: str | None = field(default=None, compare=False)
    format: Format | None = field(default=None, compare=False)

    @property
    def place(self) -> str:
        """Where in its file the row stands."""
        return f"{self.unit} {self.line}"

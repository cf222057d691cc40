"""One line of the data: parsed strictly, then checked field by field.

Every check says what is wrong and what is allowed; nothing is converted but whole-number ids.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_SPLIT_NAMES: Mapping[str, Split] = {
    **{name: name for name in SPLITS},
    **dict.fromkeys(("valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("testing",), "test"),
}
_COLUMNS_NAMED = 12


@dataclass(frozen=True, slots=True)
class Fields:
    """What a row says, before it is known where it stands."""

    client: str
    split: Split
    prompt: str
    completion: str


def parse_object(raw: bytes) -> dict[str, object] | str:
    """Parse one line into its columns, or say in one sentence why that is not possible."""
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start + 1})"
    except json.JSONDecodeError as error:
        return f"not JSON (column {error.colno}: {error.msg})"
    except RecursionError:
        return "not usable JSON (nested too deeply)"
    except ValueError as error:
        return f"not usable JSON ({error})"
    if not isinstance(row, dict):
        return f"expected an object {{...}}, got {_kind(row)}"
    return cast("dict[str, object]", row)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} is there twice")
    return row


class RowReader:
    """Checks rows, and remembers what only the whole file can tell.

    That is: which columns no row has, and whether a client is a number here and a string there.
    """

    def __init__(self, client_column: str, split_column: str | None) -> None:
        self._client_column = client_column
        self._split_column = split_column
        self._n_rows = 0
        self._missing: Counter[str] = Counter()
        self._columns: dict[str, str] = {}
        self._clients: dict[str, tuple[type, int]] = {}
        self._mixed: set[str] = set()
        self._unread_splits: Counter[object] = Counter()

    def read(self, row: Mapping[str, object], line: int) -> Fields | list[str]:
        """Return the fields of one row, or everything that is wrong with it."""
        self._n_rows += 1
        self._columns.update((column, column) for column in row)
        if self._split_column is None and isinstance(row.get("split"), str):
            self._unread_splits[row["split"]] += 1
        faults: list[str] = []
        fields = Fields(
            client=self._client(row, line, faults),
            split=self._split(row, faults),
            prompt=self._text(row, "prompt", faults),
            completion=self._text(row, self._completion_column(row, faults), faults),
        )
        return faults or fields

    def columns_no_row_has(self) -> list[str]:
        """Return one sentence for each column that is needed and nowhere in the file."""
        there = f"Columns there: {_quoted(self._columns)}"
        return [
            f"no row has {self._name(column)}. {there}{_did_you_mean(column, self._columns)}"
            for column, count in self._missing.items()
            if count == self._n_rows
        ]

    def split_nobody_reads(self) -> str | None:
        """Say so if a column `split` holds held-out rows and the recipe would train on them."""
        held_out = sum(self._unread_splits[split] for split in SPLITS if split != "train")
        if not held_out or self._unread_splits.keys() - {*SPLITS}:
            return None
        return (
            f"{held_out} rows say in 'split' that they are held out, but no split column is named"
        )

    def _name(self, column: str) -> str:
        if column == self._client_column:
            return f"the column {column!r} that data.client_column names"
        if column == self._split_column:
            return f"the column {column!r} that data.split_column names"
        if column == "completion":
            return "the column 'completion' (or 'response')"
        return f"the column {column!r}"

    def _absent(self, row: Mapping[str, object], column: str, faults: list[str]) -> bool:
        if column in row:
            return False
        self._missing[column] += 1
        faults.append(f"lacks {self._name(column)}. Columns there: {_quoted(row)}")
        return True

    def _client(self, row: Mapping[str, object], line: int, faults: list[str]) -> str:
        column = self._client_column
        if self._absent(row, column, faults):
            return ""
        value = row[column]
        if isinstance(value, bool) or not isinstance(value, int | str):
            faults.append(f"{column!r} must be a string or a whole number, got {_kind(value)}")
            return ""
        client = str(value)
        if not client.strip():
            faults.append(f"{column!r} is empty. Each row names its client")
        elif any(unicodedata.category(letter) == "Cc" for letter in client):
            faults.append(f"{column!r} holds a control character ({_short(client)})")
        elif not _encodable(client):
            faults.append(f"{column!r} holds half a surrogate pair ({_short(client)})")
        else:
            self._same_type(client, type(value), line, faults)
        return client

    def _same_type(self, client: str, kind: type, line: int, faults: list[str]) -> None:
        first_kind, first_line = self._clients.setdefault(client, (kind, line))
        if kind is not first_kind and client not in self._mixed:
            self._mixed.add(client)
            here, there = ("a number", "a string") if kind is int else ("a string", "a number")
            faults.append(
                f"client {client!r} is {here} here but {there} in line {first_line}. Keep to one"
            )

    def _split(self, row: Mapping[str, object], faults: list[str]) -> Split:
        column = self._split_column
        if column is None or self._absent(row, column, faults):
            return "train"
        value = row[column]
        for split in SPLITS:
            if value == split:
                return split
        if not isinstance(value, str):
            faults.append(f"{column!r} must be one of {_quoted(SPLITS)}, got {_kind(value)}")
            return "train"
        suggestion = _did_you_mean(value.strip().lower(), _SPLIT_NAMES)
        faults.append(f"{column!r} is {_short(value)}, not one of {_quoted(SPLITS)}{suggestion}")
        return "train"

    def _completion_column(self, row: Mapping[str, object], faults: list[str]) -> str:
        if "response" not in row:
            return "completion"
        if "completion" in row:
            faults.append("has both 'completion' and 'response', which mean the same. Keep one")
        return "response"

    def _text(self, row: Mapping[str, object], column: str, faults: list[str]) -> str:
        if self._absent(row, column, faults):
            return ""
        text = row[column]
        if not isinstance(text, str):
            faults.append(f"{column!r} must be a string, got {_kind(text)}")
            return ""
        if not text.strip():
            faults.append(f"{column!r} is empty")
        elif not _encodable(text):
            faults.append(f"{column!r} holds half a surrogate pair, which UTF-8 cannot encode")
        return text


def _did_you_mean(name: str, known: Mapping[str, str]) -> str:
    """Return a suggestion to append; ``known`` maps what people write to what they should."""
    meant = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f". Did you mean {known[meant[0]]!r}?" if meant else ""


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {_short(value)}"
    if isinstance(value, str):
        return f"the string {_short(value)}"
    return "an array" if isinstance(value, list) else "an object"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _quoted(names: Iterable[str]) -> str:
    """Return the first few names, quoted and escaped, and the number of the rest."""
    quoted = [_short(name) for name in names]
    rest = len(quoted) - _COLUMNS_NAMED
    return ", ".join(quoted[:_COLUMNS_NAMED]) + (f" and {rest} more" if rest > 0 else "")

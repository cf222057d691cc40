"""JSON Lines, read strictly: one object a line, UTF-8, no key twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO, TypeAlias, cast

from pfl_lm.data.words import kind_of, short

Row: TypeAlias = dict[str, object] | str
"""A row by its columns, or in one sentence why it cannot be read."""

MAX_LINE_BYTES = 16 * 2**20
_PATIENCE = 64
"""How many times the longest line is skipped in search of the end of one that is longer."""

BOM = b"\xef\xbb\xbf"


def read_json_lines(file: BinaryIO) -> Iterator[tuple[int, Row]]:
    """Yield each line that is not blank, and its number."""
    for line, raw in _lines(file):
        if raw is None:
            yield line, f"longer than {MAX_LINE_BYTES // 2**20} MiB"
        else:
            yield line, parse_object(raw)


def parse_object(raw: bytes) -> Row:
    """Parse one line into its columns, or say why that is not possible."""
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
        return f"expected an object {{...}}, got {kind_of(row)}"
    return cast("dict[str, object]", row)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line that is not blank, and its number; None stands for one that is too long."""
    line = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            yield line, None
            for _ in range(_PATIENCE):
                if not raw or raw.endswith(b"\n"):
                    break
                raw = file.readline(MAX_LINE_BYTES)
            else:
                return  # a file with holes may be of any size
            continue
        if line == 1:
            raw = raw.removeprefix(BOM)
        if raw.strip():
            yield line, raw.rstrip(b"\r\n")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {short(key)} is there twice")
    return row

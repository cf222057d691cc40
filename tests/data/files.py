"""Files of rows, and what is said about them."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pfl_lm.data.sources import read_records
from pfl_lm.errors import DataError
from pfl_lm.recipe.partition import PartitionOptions

FORMAT = (
    "the file is JSON Lines in UTF-8: one object a line, with the client column, `prompt` and "
    "`completion` (or `response`)"
)
FORMATS = (
    "`prompt` and `completion` (or `response`), `messages`, `instruction` and `output` (and "
    "perhaps `input`), `conversations`, or `text`"
)
ANY_FORMAT = (
    "the file is JSON Lines in UTF-8: one object a line, with the client column, and with "
    f"{FORMATS}"
)
GOOD = {"client": "a", "prompt": "p", "completion": "c"}


@dataclass
class Options:
    path: str
    client_column: str = "client"
    split_column: str | None = None
    format: str = "auto"
    group_column: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    partition: PartitionOptions | None = None
    validation_fraction: float = 0.25
    min_train_samples: int | None = None
    max_train_samples: int | None = None
    holdout_clients: int | list[str] = 0

    @property
    def source(self) -> str:
        return self.path


def write(folder: Path, *lines: bytes | str | dict) -> Options:
    raw = [line if isinstance(line, bytes) else _text(line).encode() for line in lines]
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return Options(str(path))


def _text(line: str | dict) -> str:
    return line if isinstance(line, str) else json.dumps(line)


def no_format(columns: str) -> str:
    there = f"Columns there: {columns}. data.columns can rename them"
    return f"no row has the columns of a format: {FORMATS}. {there}"


def refusal(options: Options) -> DataError:
    with pytest.raises(DataError) as caught:
        read_records(options)
    return caught.value


def problems(options: Options) -> list[str]:
    """The lines under the heading, with the heading checked."""
    error = refusal(options)
    heading, *lines = error.message.splitlines()
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert heading == f"{options.path}: {count}"
    return [line.removeprefix("  ") for line in lines]

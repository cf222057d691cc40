"""The file that the data are in, read as its ending says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pfl_lm.data.jsonlines import Row, read_json_lines
from pfl_lm.data.records import Unit
from pfl_lm.data.tables import read_csv, read_parquet
from pfl_lm.errors import DataError


@dataclass(frozen=True, slots=True)
class Kind:
    """How a file is read, and what it is called."""

    name: str
    said: str
    unit: Unit
    read: Callable[[BinaryIO], Iterator[tuple[int, Row]]]


JSON_LINES = Kind("JSON Lines", "JSON Lines in UTF-8: one object a line", "line", read_json_lines)
CSV = Kind("CSV", "CSV in UTF-8: a header, then rows of cells set off by commas", "row", read_csv)
PARQUET = Kind("Parquet", "Parquet", "row", read_parquet)
KINDS: Mapping[str, Kind] = {
    ".jsonl": JSON_LINES,
    ".json": JSON_LINES,
    ".csv": CSV,
    ".parquet": PARQUET,
}


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file."""

    path: Path
    kind: Kind

    def rows(self) -> Iterator[RawRow]:
        """Read the file as it is.

        Raises:
            DataError: it cannot be opened.
        """
        with _open(str(self.path)) as file:
            for number, columns in self.kind.read(file):
                yield RawRow(self, number, columns)


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row by its columns, or why it cannot be read, and where it stands."""

    file: DataFile
    number: int
    columns: Row

    @property
    def place(self) -> str:
        """Where the row is."""
        return f"{self.file.kind.unit} {self.number}"


def find_file(name: str) -> DataFile:
    """Return the file of the kind that its ending says; without one we know, it is JSON Lines."""
    path = Path(name)
    return DataFile(path, KINDS.get(path.suffix.lower(), JSON_LINES))


def _open(name: str) -> BinaryIO:
    try:
        return Path(name).open("rb")
    except FileNotFoundError:
        message = f"data.path: there is no file {name!r}."
        raise DataError(
            message, hint="a relative path is read from the recipe's folder; check the spelling"
        ) from None
    except IsADirectoryError:
        message = f"data.path: {name!r} is a folder."
        raise DataError(message, hint="name one file inside it") from None
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: OSError | ValueError) -> DataError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return DataError(
        f"data.path: {name!r} cannot be read ({reason}).",
        hint="check that it is a file and that you may read it",
    )

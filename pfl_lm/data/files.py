"""The files that the data are in: one file, or a folder with one file for each client.

In a folder, a file's name without its ending is the client's id. A folder holds nothing else:
what would have to be skipped or guessed is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from pfl_lm.data.cells import identifier_fault
from pfl_lm.data.jsonlines import Row, read_json_lines
from pfl_lm.data.parquet import read_parquet
from pfl_lm.data.problems import Problems
from pfl_lm.data.records import Split, Unit
from pfl_lm.data.tables import read_csv
from pfl_lm.errors import DataError
from pfl_lm.files import open_ordinary


@dataclass(frozen=True, slots=True)
class Kind:
    """How a file is read, and what it is called."""

    name: str
    said: str
    unit: Unit
    read: Callable[[BinaryIO], Iterator[tuple[int, Row]]] | None = None


DATA = "data.path"
"""The key at which a recipe names its data."""

JSON_LINES = Kind("JSON Lines", "JSON Lines in UTF-8: one object a line", "line", read_json_lines)
CSV = Kind("CSV", "CSV in UTF-8: a header, then rows of cells set off by commas", "row", read_csv)
PARQUET = Kind("Parquet", "Parquet", "row", read_parquet)
KINDS: Mapping[str, Kind] = {
    ".jsonl": JSON_LINES,
    ".json": JSON_LINES,
    ".csv": CSV,
    ".parquet": PARQUET,
}
_FOLDER_HINT = (
    "a folder holds one file for each client, named for it, and nothing else; all end in .jsonl "
    "or .json, or all in .csv, or all in .parquet"
)


class Source(Protocol):
    """What rows are read from: a file, or a split of a dataset.

    Attributes:
        kind: how it is read.
        client: whose rows they are, if they need not say so.
        split: on which side they are, if they need not say so.
        called: its name among several; None if it is the only one.
    """

    @property
    def kind(self) -> Kind: ...  # noqa: D102
    @property
    def client(self) -> str | None: ...  # noqa: D102
    @property
    def split(self) -> Split | None: ...  # noqa: D102
    @property
    def called(self) -> str | None: ...  # noqa: D102

    def rows(self) -> Iterator[RawRow]:
        """Read the rows as they are.

        Raises:
            DataError: they cannot be read, or not to their end.
        """


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file, and the client it belongs to if it is in a folder."""

    path: Path
    kind: Kind
    client: str | None = None
    split: Split | None = None

    @property
    def called(self) -> str | None:
        """The file's name, if there are several."""
        return None if self.client is None else self.path.name

    def rows(self) -> Iterator[RawRow]:
        """Read the file as it is.

        Raises:
            DataError: it cannot be opened, or not be read to its end.
        """
        assert self.kind.read is not None
        with open_file(str(self.path)) as file:
            for number, columns in self.kind.read(file):
                yield RawRow(self, number, columns)


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row by its columns, or why it cannot be read, and where it stands."""

    file: Source
    number: int
    columns: Row

    @property
    def place(self) -> str:
        """Where the row is, with the file's name if there are several."""
        place = f"{self.file.kind.unit} {self.number}"
        return place if self.file.called is None else f"{self.file.called} {place}"


def find_files(name: str) -> list[DataFile]:
    """Return the file ``name``, or the files of the folder ``name`` in the order of their names.

    A file is of the kind that its ending says; without an ending we know, it is JSON Lines.

    Raises:
        DataError: the folder cannot be read or holds anything but one file for each client; all
            that is wrong with it.
    """
    path = Path(name)
    try:
        if not path.is_dir():
            return [DataFile(path, KINDS.get(path.suffix.lower(), JSON_LINES))]
        entries = sorted(path.iterdir())
    except OSError as error:
        raise _unreadable(name, error, DATA) from None
    problems = Problems()
    files = [file for entry in entries if (file := _client_file(entry, path, problems))]
    _check_together(files, problems)
    if not entries:
        problems.add("there are no files in it")
    problems.raise_if_any(name, hint=_FOLDER_HINT)
    return files


def _client_file(entry: Path, folder: Path, problems: Problems) -> DataFile | None:
    kind = KINDS.get(entry.suffix.lower())
    if fault := _entry_fault(entry, folder, kind):
        problems.add(f"{entry.name!r} {fault}")
        return None
    assert kind is not None
    return DataFile(entry, kind, entry.stem)


def _entry_fault(entry: Path, folder: Path, kind: Kind | None) -> str | None:
    if entry.name.startswith("."):
        return "is a hidden file"
    try:
        inside = entry.resolve(strict=True).is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        return "is a link that leads nowhere"
    if not inside:
        return "is a link out of the folder"
    if entry.is_dir():
        return "is a folder"
    if not entry.is_file():
        return "is not a file"
    if kind is None:
        return f"does not end in one of {', '.join(KINDS)}"
    if not entry.stem.strip():
        return "names no client"
    return identifier_fault(entry.stem)


def _check_together(files: list[DataFile], problems: Problems) -> None:
    """Note files of several kinds, and clients with several files."""
    first_of_kind: dict[str, str] = {}
    for file in files:
        first_of_kind.setdefault(file.kind.name, file.path.name)
    if len(first_of_kind) > 1:
        kinds = ", ".join(f"{kind} ({name!r})" for kind, name in first_of_kind.items())
        problems.add(f"the files are of several kinds: {kinds}")
    of_client: dict[str, str] = {}
    for file in files:
        other = of_client.setdefault(file.path.stem, file.path.name)
        if other != file.path.name:
            problems.add(f"{other!r} and {file.path.name!r} are both of client {file.client!r}")


@contextmanager
def open_file(name: str, key: str = DATA) -> Iterator[BinaryIO]:
    """Open a file that the recipe names at ``key``.

    Raises:
        DataError: it is not there, cannot be opened, or cannot be read while it is open.
    """
    try:
        file = open_ordinary(Path(name))
    except FileNotFoundError:
        message = f"{key}: there is no file {name!r}."
        raise DataError(
            message, hint="a relative path is read from the recipe's folder; check the spelling"
        ) from None
    except (OSError, ValueError) as error:
        raise _unreadable(name, error, key) from None
    try:
        with file:
            yield file
    except OSError as error:
        raise _unreadable(name, error, key) from None


def _unreadable(name: str, error: OSError | ValueError, key: str) -> DataError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return DataError(
        f"{key}: {name!r} cannot be read ({reason}).",
        hint="check that it is a file and that you may read it",
    )

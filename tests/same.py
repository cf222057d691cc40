"""What two runs of one recipe must have equal, however often either was interrupted."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

PATHS = ("recipe.yaml", "recipe.resolved.yaml")
CLOCKS = {"seconds", "at"}
OF_AN_ATTEMPT = {"attempts"}


def files_in(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def results_in(folder: Path, apart: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return every file of a run but those that hold clocks or its own place.

    What begins like one of ``apart`` is left out as well.
    """
    apart = (*apart, *PATHS, "federation.sqlite")
    return {name: c for name, c in files_in(folder).items() if not name.startswith(apart)}


def folders_in(folder: Path, apart: tuple[str, ...] = ()) -> list[str]:
    """Return every folder below a folder by its path, ending in a slash."""
    found = (path for path in folder.rglob("*") if path.is_dir())
    names = (path.relative_to(folder).as_posix() + "/" for path in found)
    return sorted(name for name in names if not name.startswith(apart))


def facts_in(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row of a ledger, by table, without clocks, attempts and the run's own place."""
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        tables = ledger.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        found = {}
        for table in sorted(name for (name,) in tables if name not in OF_AN_ATTEMPT):
            about = ledger.execute(f"PRAGMA table_info({table})").fetchall()
            columns = ", ".join(row[1] for row in about if row[1] not in CLOCKS)
            rows = ledger.execute(f"SELECT {columns} FROM {table} ORDER BY {columns}").fetchall()
            found[table] = [row for row in rows if (table, row[0]) != ("run", "recipe")]
    return found


def check_same(one: Path, other: Path, apart: tuple[str, ...] = ()) -> None:
    """Compare two run folders, file by file and row by row; ``apart`` as in `results_in`."""
    files, others = results_in(one, apart), results_in(other, apart)
    assert files.keys() == others.keys()
    assert folders_in(one, apart) == folders_in(other, apart)
    assert [name for name in files if files[name] != others[name]] == []
    assert facts_in(one) == facts_in(other)

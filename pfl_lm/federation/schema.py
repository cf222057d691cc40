"""The tables of ``federation.sqlite``, how they are opened, and how older ones are brought along.

The version stands in SQLite's ``user_version``. A ledger of a newer version is left alone: what
this program does not know of it could not be kept right.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pfl_lm.errors import RunFolderError

VERSION = 3

TABLES = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE clients (
    client TEXT PRIMARY KEY, slug TEXT NOT NULL UNIQUE,
    n_train INTEGER NOT NULL, n_validation INTEGER NOT NULL, n_test INTEGER NOT NULL,
    rows_sha256 TEXT, joined INTEGER NOT NULL DEFAULT 0, data_path TEXT
) STRICT;
CREATE TABLE cohorts (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients,
    tries INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (round, client)
) STRICT;
CREATE TABLE turns (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients,
    state_path TEXT NOT NULL, state_sha256 TEXT NOT NULL,
    upload_path TEXT, upload_sha256 TEXT,
    weight REAL NOT NULL, steps INTEGER NOT NULL,
    bytes_down INTEGER NOT NULL, bytes_up INTEGER NOT NULL,
    summary TEXT NOT NULL, seconds REAL NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (round, client)
) STRICT;
CREATE INDEX turns_by_client ON turns (client, round);
CREATE TABLE faults (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients, try INTEGER NOT NULL,
    kind TEXT NOT NULL, message TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (round, client, try)
) STRICT;
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY,
    state_path TEXT NOT NULL, state_sha256 TEXT NOT NULL, at REAL NOT NULL
) STRICT;
CREATE TABLE scores (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients,
    split TEXT NOT NULL, candidate TEXT NOT NULL, nll REAL NOT NULL,
    rows INTEGER NOT NULL, tokens INTEGER NOT NULL,
    PRIMARY KEY (round, client, split, candidate)
) STRICT;
CREATE TABLE metrics (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients,
    split TEXT NOT NULL, candidate TEXT NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (round, client, split, candidate, metric)
) STRICT;
CREATE TABLE choices (
    client TEXT PRIMARY KEY REFERENCES clients, candidate TEXT NOT NULL, reason TEXT NOT NULL,
    margin REAL NOT NULL, standard_error REAL NOT NULL, round INTEGER NOT NULL
) STRICT;
CREATE TABLE removed (client_digest TEXT PRIMARY KEY) STRICT;
CREATE TABLE attempts (
    attempt INTEGER PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL,
    began REAL NOT NULL, ended REAL, outcome TEXT
) STRICT;
"""

_METRICS = TABLES[TABLES.index("CREATE TABLE metrics") : TABLES.index("CREATE TABLE choices")]

_OLD = ("choices", "scores", "turns", "rounds", "clients", "run")
_ASIDE = "".join(f"ALTER TABLE {name} RENAME TO {name}_1;\n" for name in _OLD)
_AWAY = "".join(f"DROP TABLE {name}_1;\n" for name in _OLD)

MIGRATIONS = {
    1: f"""
{_ASIDE}
{TABLES}
INSERT INTO run SELECT * FROM run_1;
INSERT INTO clients (client, slug, n_train, n_validation, n_test) SELECT * FROM clients_1;
INSERT INTO cohorts (round, client)
    SELECT round, drawn.value FROM rounds_1, json_each(rounds_1.cohort) AS drawn;
INSERT OR IGNORE INTO cohorts (round, client) SELECT round, client FROM turns_1;
INSERT INTO turns SELECT * FROM turns_1;
INSERT INTO rounds SELECT round, state_path, state_sha256, at FROM rounds_1;
INSERT INTO scores SELECT * FROM scores_1;
INSERT INTO choices SELECT *, (SELECT max(round) FROM rounds_1) FROM choices_1;
{_AWAY}
""",
    2: _METRICS.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"),
}
"""From each version to the next, as one transaction."""


def connect(path: Path) -> sqlite3.Connection:
    """Open a ledger, new or old, with the tables of this version in it.

    WAL mode with full synchronisation: what is committed survives a power cut.

    Raises:
        RunFolderError: it cannot be read or written, is no ledger, or is a newer program's.
    """
    if path.is_symlink():
        raise RunFolderError(f"{path}: a link; a run folder's ledger is a file in it")
    with explained(path):
        # turns are committed by a thread of their own, at most one at a time
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")  # a client that was removed is gone
    [(version,)] = connection.execute("PRAGMA user_version")
    [(tables,)] = connection.execute("SELECT count(*) FROM sqlite_schema")
    if version == 0 and tables == 0:
        _run(connection, TABLES, VERSION)
    elif not 1 <= version <= VERSION:
        what = f"version {version} of the ledger" if version else "no ledger of pfl-lm"
        hint = "update pfl-lm: a newer one wrote this" if version > VERSION else None
        raise RunFolderError(
            f"{path}: {what}; this pfl-lm reads versions 1 to {VERSION}", hint=hint
        )
    for old in range(version, VERSION) if version else ():
        _run(connection, MIGRATIONS[old], old + 1)
    if version:
        _refuse_others(connection, path)
    connection.execute("PRAGMA foreign_keys = ON")


DAMAGED = "the file was damaged or changed; put back a copy of the run folder"
"""What to do about a ledger that holds what pfl-lm does not write."""

_STRANGERS = "PRAGMA foreign_key_check"
_UNFOUNDED = (  # choices without the scores that they were committed with
    "SELECT client FROM choices EXCEPT SELECT client FROM choices "
    "JOIN scores USING (client, round, candidate) WHERE split = 'validation'"
)


def _refuse_others(connection: sqlite3.Connection, path: Path) -> None:
    """Make sure that the tables are ours, so that SQLite itself vouches for the types in them.

    Raises:
        RunFolderError: a table or its definition is another one, or the file is damaged.
    """
    with closing(sqlite3.connect(":memory:")) as fresh:
        fresh.executescript(TABLES)
        ours = _definitions(fresh)
    found = [problem for (problem,) in connection.execute("PRAGMA quick_check(5)")]
    as_ours = found == ["ok"] and _definitions(connection) == ours
    if not as_ours or any(connection.execute(rows).fetchone() for rows in (_STRANGERS, _UNFOUNDED)):
        raise RunFolderError(
            f"{path}: not a ledger as pfl-lm writes it",
            hint=DAMAGED,
        )


def _definitions(connection: sqlite3.Connection) -> set[str]:
    rows = connection.execute("SELECT sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'")
    return {" ".join(str(sql).split()) for (sql,) in rows}


def _run(connection: sqlite3.Connection, statements: str, version: int) -> None:
    connection.execute("PRAGMA legacy_alter_table = ON")
    connection.executescript(f"BEGIN; {statements} PRAGMA user_version = {version}; COMMIT;")
    connection.execute("PRAGMA legacy_alter_table = OFF")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what SQLite says of a ledger into a RunFolderError."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):  # ours, not the file's
        raise
    except sqlite3.OperationalError as error:
        hint = "see that the folder can be written to and that its disk has room"
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_FULL:
            hint = "make room on this disk; what was committed before is intact"
        raise RunFolderError(f"{path}: cannot be written: {error}", hint=hint) from error
    except sqlite3.DatabaseError as error:
        raise RunFolderError(
            f"{path}: not a ledger that can be read: {error}",
            hint=DAMAGED,
        ) from error

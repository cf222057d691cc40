"""The tables of ``federation.sqlite``, how they are opened, and how older ones are brought along.

The version stands in SQLite's ``user_version``. A ledger of a newer version is left alone: what
this program does not know of it could not be kept right.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pfl_lm.errors import RunFolderError

VERSION = 2

TABLES = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE clients (
    client TEXT PRIMARY KEY, slug TEXT NOT NULL UNIQUE,
    n_train INTEGER NOT NULL, n_validation INTEGER NOT NULL, n_test INTEGER NOT NULL,
    rows_sha256 TEXT, joined INTEGER NOT NULL DEFAULT 0, data_path TEXT
);
CREATE TABLE cohorts (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients,
    tries INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (round, client)
);
CREATE TABLE turns (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients,
    state_path TEXT NOT NULL, state_sha256 TEXT NOT NULL,
    upload_path TEXT, upload_sha256 TEXT,
    weight REAL NOT NULL, steps INTEGER NOT NULL,
    bytes_down INTEGER NOT NULL, bytes_up INTEGER NOT NULL,
    summary TEXT NOT NULL, seconds REAL NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (round, client)
);
CREATE INDEX turns_by_client ON turns (client, round);
CREATE TABLE faults (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients, try INTEGER NOT NULL,
    kind TEXT NOT NULL, message TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (round, client, try)
);
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY,
    state_path TEXT NOT NULL, state_sha256 TEXT NOT NULL, at REAL NOT NULL
);
CREATE TABLE scores (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients,
    split TEXT NOT NULL, candidate TEXT NOT NULL, nll REAL NOT NULL,
    rows INTEGER NOT NULL, tokens INTEGER NOT NULL,
    PRIMARY KEY (round, client, split, candidate)
);
CREATE TABLE choices (
    client TEXT PRIMARY KEY REFERENCES clients, candidate TEXT NOT NULL, reason TEXT NOT NULL,
    margin REAL NOT NULL, standard_error REAL NOT NULL, round INTEGER NOT NULL
);
CREATE TABLE removed (client_digest TEXT PRIMARY KEY);
CREATE TABLE attempts (
    attempt INTEGER PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL,
    began REAL NOT NULL, ended REAL, outcome TEXT
);
"""

MIGRATIONS = {
    1: """
ALTER TABLE clients ADD COLUMN rows_sha256 TEXT;
ALTER TABLE clients ADD COLUMN joined INTEGER NOT NULL DEFAULT 0;
ALTER TABLE clients ADD COLUMN data_path TEXT;
CREATE TABLE cohorts (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients,
    tries INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (round, client)
);
INSERT INTO cohorts (round, client)
    SELECT round, drawn.value FROM rounds, json_each(rounds.cohort) AS drawn;
INSERT OR IGNORE INTO cohorts (round, client) SELECT round, client FROM turns;
ALTER TABLE rounds DROP COLUMN cohort;
ALTER TABLE turns RENAME TO turns_1;
CREATE TABLE turns (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients,
    state_path TEXT NOT NULL, state_sha256 TEXT NOT NULL,
    upload_path TEXT, upload_sha256 TEXT,
    weight REAL NOT NULL, steps INTEGER NOT NULL,
    bytes_down INTEGER NOT NULL, bytes_up INTEGER NOT NULL,
    summary TEXT NOT NULL, seconds REAL NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (round, client)
);
INSERT INTO turns SELECT * FROM turns_1;
DROP TABLE turns_1;
CREATE INDEX turns_by_client ON turns (client, round);
CREATE TABLE faults (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients, try INTEGER NOT NULL,
    kind TEXT NOT NULL, message TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (round, client, try)
);
ALTER TABLE choices ADD COLUMN round INTEGER NOT NULL DEFAULT 0;
UPDATE choices SET round = (SELECT max(round) FROM rounds);
CREATE TABLE removed (client_digest TEXT PRIMARY KEY);
CREATE TABLE attempts (
    attempt INTEGER PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL,
    began REAL NOT NULL, ended REAL, outcome TEXT
);
""",
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
        connection = sqlite3.connect(path, isolation_level=None)
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
    connection.execute("PRAGMA foreign_keys = ON")


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
            hint="the file was damaged or changed; put back a copy of the run folder",
        ) from error

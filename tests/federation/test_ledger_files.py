"""The ledger as a file: opened again, of another version, or not a ledger at all."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pfl_lm.errors import RunFolderError
from pfl_lm.federation.history import Member
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.schema import MIGRATIONS, TABLES, VERSION
from tests.federation.entries import CLIENTS, file, turn


def test_what_is_committed_is_there_when_opened_again(ledger: Ledger) -> None:
    turn(ledger, "a", 1)
    ledger.close()
    again = Ledger(ledger.path)
    assert again.members() == CLIENTS
    assert again.state_file("a") == file("a-1")
    again.close()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"x" * 5000, "not a ledger that can be read: file is not a database"),
        (VERSION + 1, f"version {VERSION + 1} of the ledger; this pfl-lm reads versions 1 to "),
        (0, "no ledger of pfl-lm; this pfl-lm reads versions 1 to "),
    ],
)
def test_other_files_are_refused_and_left_alone(
    tmp_path: Path, content: bytes | int, said: str
) -> None:
    path = tmp_path / "federation.sqlite"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE theirs (a)")
            other.execute(f"PRAGMA user_version = {content}")
    with pytest.raises(RunFolderError) as caught:
        Ledger(path)
    assert caught.value.message.startswith(f"{path}: {said}")
    if isinstance(content, bytes):
        assert path.read_bytes() == content
    else:
        with closing(sqlite3.connect(path)) as other:
            assert other.execute("SELECT name FROM sqlite_schema").fetchall() == [("theirs",)]


@pytest.mark.parametrize(
    "statement",
    ["DELETE FROM scores", "DELETE FROM scores WHERE split = 'validation'", "DROP TABLE scores"],
)
def test_a_choice_without_its_scores_is_refused(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "federation.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.executescript(VERSION_1)
    Ledger(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as changed:
        changed.execute(statement)
    with pytest.raises(RunFolderError, match="not a ledger as pfl-lm writes it"):
        Ledger(path)


def test_a_ledger_that_is_a_link_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    link = tmp_path / "linked" / "federation.sqlite"
    link.symlink_to(ledger.path)
    with pytest.raises(RunFolderError, match="a link; a run folder's ledger is a file in it"):
        Ledger(link)


VERSION_1 = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE clients (
    client TEXT PRIMARY KEY, slug TEXT NOT NULL UNIQUE,
    n_train INTEGER NOT NULL, n_validation INTEGER NOT NULL, n_test INTEGER NOT NULL
);
CREATE TABLE turns (
    round INTEGER NOT NULL, client TEXT NOT NULL REFERENCES clients,
    state_path TEXT NOT NULL, state_sha256 TEXT NOT NULL,
    upload_path TEXT NOT NULL, upload_sha256 TEXT NOT NULL,
    weight REAL NOT NULL, steps INTEGER NOT NULL,
    bytes_down INTEGER NOT NULL, bytes_up INTEGER NOT NULL,
    summary TEXT NOT NULL, seconds REAL NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (round, client)
);
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY, cohort TEXT NOT NULL,
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
    margin REAL NOT NULL, standard_error REAL NOT NULL
);
INSERT INTO run VALUES ('name', 'old');
INSERT INTO clients VALUES ('a', 'slug-a', 5, 1, 2), ('b', 'slug-b', 7, 1, 0);
INSERT INTO turns
    VALUES (1, 'a', 'a-1', 'sha-a-1', 'up-a-1', 'sha-up-a-1', 5, 4, 40, 52, '{}', 1, 2);
INSERT INTO rounds VALUES (0, '[]', 'server-0', 'sha-server-0', 1);
INSERT INTO rounds VALUES (1, '["a"]', 'server-1', 'sha-server-1', 2);
INSERT INTO scores VALUES (1, 'a', 'validation', 'local', 1.25, 1, 9);
INSERT INTO choices VALUES ('a', 'local', 'why', -0.5, 0.25);
PRAGMA user_version = 1;
"""


def test_a_ledger_of_version_1_is_brought_along(tmp_path: Path) -> None:
    path = tmp_path / "federation.sqlite"
    with closing(sqlite3.connect(path)) as old:
        old.executescript(VERSION_1)
    ledger = Ledger(path)
    assert ledger.about() == {"name": "old"}
    assert ledger.members() == [Member("a", "slug-a", 5, 1, 2), Member("b", "slug-b", 7, 1, 0)]
    assert (ledger.last_round(), ledger.cohort(1)) == (1, ["a"])
    assert ledger.live_files() == [file("a-1"), file("server-1")]
    assert ledger.turns(1)[0].upload == file("up-a-1")
    assert list(ledger.scores()) == [(1, "a", "validation", "local", 1.25)]
    assert (ledger.choices()["a"].candidate, ledger.chosen(1)) == ("local", {"a"})
    ledger.close()


def test_every_older_version_ends_with_the_tables_of_this_one(tmp_path: Path) -> None:
    """Column by column; and a migration leads on from each version there was."""
    assert set(MIGRATIONS) == set(range(1, VERSION))

    def columns(connection: sqlite3.Connection) -> dict[str, list[tuple[object, ...]]]:
        names = "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name"
        found = {}
        for (name,) in connection.execute(names).fetchall():
            about = connection.execute(f"PRAGMA table_info({name})").fetchall()
            found[name] = [
                (column, kind, required, key) for _, column, kind, required, _, key in about
            ]
        return found

    old, new = tmp_path / "old" / "federation.sqlite", sqlite3.connect(":memory:")
    old.parent.mkdir()
    with closing(sqlite3.connect(old)) as connection:
        connection.executescript(VERSION_1)
    Ledger(old).close()
    new.executescript(TABLES)
    with closing(sqlite3.connect(old)) as connection:
        assert columns(connection) == columns(new)


def test_a_ledger_without_metrics_is_brought_along(tmp_path: Path) -> None:
    """Version 2, as it was: all of this one's tables but one."""
    path = tmp_path / "federation.sqlite"
    ledger = Ledger(path)
    ledger.open_run({"name": "old"}, [])
    ledger.close()
    with closing(sqlite3.connect(path)) as old:
        old.executescript("DROP TABLE metrics; PRAGMA user_version = 2;")
    for _ in range(2):  # and is then one like any other
        ledger = Ledger(path)
        assert ledger.about() == {"name": "old"}
        assert list(ledger.measured()) == ledger.final_metrics() == []
        ledger.close()


def test_a_place_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be written: unable to open"):
        Ledger(tmp_path / "nowhere" / "federation.sqlite")


def test_closing_leaves_one_file(ledger: Ledger) -> None:
    turn(ledger, "a", 1)
    ledger.close()
    assert [path.name for path in ledger.path.parent.iterdir()] == ["federation.sqlite"]

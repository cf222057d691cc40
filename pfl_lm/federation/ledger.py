"""What happened in a run, as rows: the commit of every turn and every round.

SQLite in WAL mode with full synchronisation. A turn exists once its row does; a round is aggregated
once its row is there. Clocks stand in columns of their own (``seconds``, ``at``): everything else
is equal between two runs of one recipe.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pfl_lm.errors import RunFolderError
from pfl_lm.evaluate import Choice
from pfl_lm.federation.messages import Score, StateFile, Update
from pfl_lm.layout import Vector

SCHEMA_VERSION = 1

_SCHEMA = """
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
"""


class Ledger:
    """The open ``federation.sqlite`` of one run folder.

    Raises:
        RunFolderError: from every method, if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        """Create the ledger of a new run.

        Raises:
            RunFolderError: there is one already.
        """
        if path.exists():
            raise RunFolderError(f"{path}: this folder already holds a run")
        self.path = path
        try:
            self._connection = sqlite3.connect(path, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise self._unwritable(error) from error
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
        except sqlite3.OperationalError as error:
            self._connection.close()
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Fold the write-ahead log into the file and close it."""
        self._connection.close()

    def open_run(
        self, about: Mapping[str, str], clients: Iterable[tuple[str, str, int, int, int]]
    ) -> None:
        """Commit what the run is and who takes part: (id, slug, train, validation, test rows)."""
        self._commit(
            ("INSERT INTO run VALUES (?, ?)", list(about.items())),
            ("INSERT INTO clients VALUES (?, ?, ?, ?, ?)", list(clients)),
        )

    def commit_turn(self, update: Update, upload: StateFile, bytes_down: int) -> None:
        """Commit one client's turn: from here on it has happened."""
        assert update.state is not None
        assert update.upload is not None
        row = (
            update.round,
            update.client,
            update.state.path,
            update.state.sha256,
            upload.path,
            upload.sha256,
            update.upload.weight,
            update.steps_done,
            bytes_down,
            size_in_bytes(update.upload.vectors.values()),
            json.dumps(update.summary, sort_keys=True),
            update.seconds,
            time.time(),
        )
        self._commit((f"INSERT INTO turns VALUES ({', '.join('?' * len(row))})", [row]))

    def commit_round(self, round: int, cohort: Sequence[str], server: StateFile) -> None:
        """Commit a round's aggregate."""
        row = (round, json.dumps(list(cohort)), server.path, server.sha256, time.time())
        self._commit(("INSERT INTO rounds VALUES (?, ?, ?, ?, ?)", [row]))

    def commit_scores(self, round: int, client: str, scores: Iterable[Score]) -> None:
        """Commit one client's scores of a round."""
        rows = [(round, client, s.split, s.candidate, s.nll, s.rows, s.tokens) for s in scores]
        self._commit(("INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?, ?)", rows))

    def commit_choice(self, client: str, choice: Choice) -> None:
        """Commit which model is a client's own."""
        row = (client, choice.candidate, choice.reason, choice.margin, choice.standard_error)
        self._commit(("INSERT INTO choices VALUES (?, ?, ?, ?, ?)", [row]))

    def state_file(self, client: str) -> StateFile | None:
        """Return the file of a client's last committed turn; None before its first."""
        found = self._connection.execute(
            "SELECT state_path, state_sha256 FROM turns WHERE client = ? ORDER BY round DESC",
            (client,),
        ).fetchone()
        return None if found is None else StateFile(*found)

    def superseded(self, round: int) -> list[str]:
        """Return the files that the commit of this round's aggregate has made useless.

        Its uploads, the server's states before it, and what its cohort's clients wrote before.
        """
        rows = self._connection.execute(
            "SELECT upload_path FROM turns WHERE round = :round "
            "UNION SELECT state_path FROM rounds WHERE round < :round "
            "UNION SELECT old.state_path FROM turns old JOIN turns new USING (client) "
            "WHERE new.round = :round AND old.round < :round",
            {"round": round},
        )
        return sorted(path for (path,) in rows)

    def scores(self) -> list[tuple[int, str, str, str, float]]:
        """Return every score as (round, client, split, candidate, nll), in that order."""
        return self._connection.execute(
            "SELECT round, client, split, candidate, nll FROM scores ORDER BY 1, 2, 3, 4"
        ).fetchall()

    def start_over(self) -> list[str]:
        """Forget every round, in one commit, and return the files they had written."""
        columns = ("state_path FROM turns", "upload_path FROM turns", "state_path FROM rounds")
        query = " UNION ".join(f"SELECT {column}" for column in columns)
        paths = sorted(path for (path,) in self._connection.execute(query))
        self._commit(*((f"DELETE FROM {table}", [()]) for table in ("turns", "rounds", "scores")))
        return paths

    def note(self, key: str, value: str) -> None:
        """Commit one more fact about the run, or its new value."""
        self._commit(("INSERT OR REPLACE INTO run VALUES (?, ?)", [(key, value)]))

    def noted(self, key: str) -> str | None:
        """Return a fact about the run; None if it was never noted."""
        query = "SELECT value FROM run WHERE key = ?"
        found = self._connection.execute(query, (key,)).fetchone()
        return None if found is None else str(found[0])

    def choices(self) -> dict[str, Choice]:
        """Return every client's choice, in id order."""
        rows = self._connection.execute(
            "SELECT client, candidate, reason, margin, standard_error FROM choices ORDER BY client"
        )
        return {client: Choice(*choice) for client, *choice in rows}

    def summaries(self) -> list[tuple[str, dict[str, float]]]:
        """Return whose turn it was and its summary, for every turn in the order of rounds."""
        query = "SELECT client, summary FROM turns ORDER BY round, client"
        return [(client, json.loads(told)) for client, told in self._connection.execute(query)]

    def traffic(self) -> dict[str, tuple[int, int, int]]:
        """Return (turns, bytes down, bytes up) of every client that trained, in id order."""
        rows = self._connection.execute(
            "SELECT client, count(*), sum(bytes_down), sum(bytes_up) FROM turns "
            "GROUP BY client ORDER BY client"
        )
        return {client: (turns, down, up) for client, turns, down, up in rows}

    def _commit(self, *statements: tuple[str, Sequence[Sequence[object]]]) -> None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for statement, rows in statements:
                self._connection.executemany(statement, rows)
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise self._unwritable(error) from error
            raise

    def _unwritable(self, error: sqlite3.OperationalError) -> RunFolderError:
        hint = "see that the folder can be written to and that its disk has room"
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            hint = "make room on this disk; what was committed before is intact"
        return RunFolderError(f"{self.path}: cannot be written: {error}", hint=hint)


def size_in_bytes(vectors: Iterable[Vector]) -> int:
    """Return how many bytes these vectors take on the wire, headers aside."""
    return sum(vector.numel() * vector.element_size() for vector in vectors)

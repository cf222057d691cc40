"""What happened in a run, as rows: the commit of every turn and every round.

SQLite, one row a fact (schema.py). A turn exists once its row does; a round is aggregated once its
row is there. Clocks stand in columns of their own (``seconds``, ``at``, the table ``attempts``):
everything else is equal between two runs of one recipe, however often either was interrupted.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from pfl_lm.federation.history import History, Member, StateFile, client_digest
from pfl_lm.federation.messages import Fault, Update
from pfl_lm.federation.schema import connect, explained
from pfl_lm.layout import Vector

ABOUT_A_CLIENT = ("choices", "metrics", "scores", "faults", "turns", "cohorts", "clients")
"""Tables with a column ``client``, each before those it refers to."""

INSERT_ABOUT = "INSERT OR REPLACE INTO run VALUES (?, ?)"
INSERT_MEMBER = "INSERT INTO clients VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
FORGET_FINISHED = ("DELETE FROM run WHERE key = 'finished'", [()])
NO_ROUNDS = tuple(
    (f"DELETE FROM {table}", [()])
    for table in ("choices", "metrics", "scores", "faults", "turns", "cohorts", "rounds")
)


class Ledger(History):
    """The open ``federation.sqlite`` of one run folder.

    Raises:
        RunFolderError: from every method, if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        """Open the ledger, or create it.

        Raises:
            RunFolderError: it is none, damaged, or of a newer version.
        """
        self.path = path
        self._connection = connect(path)

    def close(self) -> None:
        """Fold the write-ahead log into the file and close it."""
        self._connection.close()

    def open_run(self, about: Mapping[str, str], members: Iterable[Member]) -> None:
        """Commit what the run is and who takes part: from here on there is a run."""
        self._commit(
            (INSERT_ABOUT, list(about.items())),
            (INSERT_MEMBER, [astuple(member) for member in members]),
        )

    def begin_attempt(self) -> int:
        """Commit that a process has taken the run up; return the attempt's number."""
        who = (platform.node(), os.getpid(), time.time())
        self._commit(("INSERT INTO attempts (host, pid, began) VALUES (?, ?, ?)", [who]))
        [(attempt,)] = self._ask("SELECT max(attempt) FROM attempts")
        return int(attempt)

    def end_attempt(self, attempt: int, outcome: str) -> None:
        """Commit how an attempt has ended; a process that was killed leaves this open."""
        row = (time.time(), outcome, attempt)
        self._commit(("UPDATE attempts SET ended = ?, outcome = ? WHERE attempt = ?", [row]))

    def note(self, key: str, value: str) -> None:
        """Commit one more fact about the run, or its new value."""
        self._commit((INSERT_ABOUT, [(key, value)]))

    def commit_cohort(self, round: int, clients: Iterable[str]) -> None:
        """Commit who takes part in a round, before any of them does."""
        rows = [(round, client) for client in clients]
        self._commit(("INSERT INTO cohorts (round, client) VALUES (?, ?)", rows))

    def commit_turn(self, update: Update, upload: StateFile | None, bytes_down: int) -> None:
        """Commit one client's turn: from here on it has happened."""
        assert update.state is not None
        assert update.upload is not None
        row = (
            update.round,
            update.client,
            update.state.path,
            update.state.sha256,
            None if upload is None else upload.path,
            None if upload is None else upload.sha256,
            update.upload.weight,
            update.steps_done,
            bytes_down,
            size_in_bytes(update.upload.vectors.values()),
            json.dumps(update.summary, sort_keys=True),
            update.seconds,
            time.time(),
        )
        self._commit((f"INSERT INTO turns VALUES ({', '.join('?' * len(row))})", [row]))

    def commit_fault(self, round: int, client: str, fault: Fault) -> int:
        """Commit that a turn has failed; return how often it has in this round."""
        where = (round, client)
        count = "(SELECT count(*) + 1 FROM faults WHERE round = ? AND client = ?)"
        row = (*where, *where, fault.kind, fault.message, time.time())
        self._commit(
            (f"INSERT INTO faults VALUES (?, ?, {count}, ?, ?, ?)", [row]),
            ("UPDATE cohorts SET tries = tries + 1 WHERE round = ? AND client = ?", [where]),
        )
        [(tries,)] = self._ask("SELECT tries FROM cohorts WHERE round = ? AND client = ?", *where)
        return int(tries)

    def forgive(self, round: int) -> None:
        """Commit that those who sit a round out may try again."""
        self._commit(("UPDATE cohorts SET tries = 0 WHERE round = ?", [(round,)]))

    def commit_round(self, round: int, server: StateFile) -> None:
        """Commit a round's aggregate: the round is over."""
        row = (round, server.path, server.sha256, time.time())
        self._commit(("INSERT INTO rounds VALUES (?, ?, ?, ?)", [row]))

    def commit_scores(self, update: Update) -> None:
        """Commit one client's scores of a round and, after the last, which model is its own."""
        at = (update.round, update.client)
        rows = [(*at, s.split, s.candidate, s.nll, s.rows, s.tokens) for s in update.scores]
        metrics = [
            (*at, s.split, s.candidate, name, value)
            for s in update.scores
            for name, value in s.metrics.items()
        ]
        choices = []
        if (choice := update.choice) is not None:
            about = (choice.candidate, choice.reason, choice.margin, choice.standard_error)
            choices = [(update.client, *about, update.round)]
        self._commit(
            ("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?, ?)", rows),
            ("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?, ?)", metrics),
            ("INSERT OR REPLACE INTO choices VALUES (?, ?, ?, ?, ?, ?)", choices),
        )

    def start_over(self, **about: str) -> list[str]:
        """Forget every round, in one commit, and return the files they had written.

        ``about`` are facts about the run that change with it.
        """
        paths = self._all_files()
        self._commit(*NO_ROUNDS, (INSERT_ABOUT, list(about.items())))
        return paths

    def add_member(self, member: Member) -> None:
        """Commit that a client has joined; a run that was finished has more to do."""
        self._commit(
            (INSERT_MEMBER, [astuple(member)]),
            ("DELETE FROM removed WHERE client_digest = ?", [(client_digest(member.client),)]),
            FORGET_FINISHED,
        )

    def remove_member(self, client: str, *, replay: bool = False) -> list[str]:
        """Forget a client, in one commit, and return the files that nobody needs any more.

        What is left of it is a digest of its id, so that its rows are not taken in again. With
        ``replay`` every round is forgotten with it, and an automatic rate that it had a say in.
        """
        own = "SELECT state_path, upload_path FROM turns WHERE client = ?"
        paths = self._all_files() if replay else self._paths(own, client)
        rounds = (*NO_ROUNDS, ("DELETE FROM run WHERE key = 'learning_rate'", [()]))
        self._commit(
            *((f"DELETE FROM {table} WHERE client = ?", [(client,)]) for table in ABOUT_A_CLIENT),
            ("INSERT OR REPLACE INTO removed VALUES (?)", [(client_digest(client),)]),
            *(rounds if replay else ()),
            FORGET_FINISHED,
        )
        return paths

    def _all_files(self) -> list[str]:
        return self._paths(
            "SELECT state_path, upload_path FROM turns UNION SELECT state_path, NULL FROM rounds"
        )

    def _paths(self, query: str, *given: object) -> list[str]:
        return sorted({path for row in self._ask(query, *given) for path in row if path})

    def _commit(self, *statements: tuple[str, Sequence[Sequence[object]]]) -> None:
        with explained(self.path):
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                for statement, rows in statements:
                    self._connection.executemany(statement, rows)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


def size_in_bytes(vectors: Iterable[Vector]) -> int:
    """Return how many bytes these vectors take on the wire, headers aside."""
    return sum(vector.numel() * vector.element_size() for vector in vectors)

"""What a ledger says: the read side of a run, from its open database.

A round is *over* once its row in ``rounds`` is there; until then its cohort is drawn, and its turns
and faults are what has happened of it so far. No torch here: a run can be looked at quickly.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfl_lm.errors import RunFolderError
from pfl_lm.federation.schema import explained

if TYPE_CHECKING:
    from pfl_lm.evaluate import Choice

MOST_TRIES = 2
"""How often a client's turn is tried in one round before the client sits it out."""


@dataclass(frozen=True, slots=True)
class StateFile:
    """A file of a run's state, as a row names it: path within the run folder, and SHA-256."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Member:
    """One client of a run, as it was when it came in.

    Attributes:
        rows_sha256: of its rows; None if an older program did not note it.
        joined: the last round that was over when it came; it takes part in later ones.
        data_path: the file it brought along when it joined, empty if the recipe's data had kept its
            rows for later; None if it was there from the beginning.
    """

    client: str
    slug: str
    n_train: int
    n_validation: int
    n_test: int
    rows_sha256: str | None = None
    joined: int = 0
    data_path: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One committed turn; ``upload`` is None for one that no aggregate takes in."""

    client: str
    upload: StateFile | None
    bytes_up: int
    summary: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What the committed turns of a run have taken, over all rounds and clients.

    Attributes:
        steps: optimizer steps, as they were done.
        seconds: time of the turns on the clients' machines; scoring not counted.
        faults: tries that have failed, whether a second one came through or not.
    """

    steps: int
    bytes_down: int
    bytes_up: int
    seconds: float
    faults: int


class History:
    """Questions to a ledger. Every answer is of what has been committed.

    Raises:
        RunFolderError: from every method, if the file cannot be read.
    """

    path: Path
    _connection: sqlite3.Connection

    def about(self) -> dict[str, str]:
        """Return what the run is: recipe, versions, the chosen learning rate."""
        return dict(self._ask("SELECT key, value FROM run ORDER BY key"))

    def members(self) -> list[Member]:
        """Return every client, in id order."""
        rows = self._ask(
            "SELECT client, slug, n_train, n_validation, n_test, rows_sha256, joined, data_path "
            "FROM clients ORDER BY client"
        )
        return [Member(*row) for row in rows]

    def removed(self) -> set[str]:
        """Return the digests of clients that were removed."""
        return {digest for (digest,) in self._ask("SELECT client_digest FROM removed")}

    def newcomers(self, round: int) -> list[str]:
        """Return who has joined by a round and has not had its first turn, in id order."""
        rows = self._ask(
            "SELECT client FROM clients WHERE data_path IS NOT NULL AND joined <= ? "
            "AND client NOT IN (SELECT client FROM turns) ORDER BY client",
            round,
        )
        return [client for (client,) in rows]

    def last_round(self) -> int | None:
        """Return the last round that is over; None before round 0 is."""
        [(last,)] = self._ask("SELECT max(round) FROM rounds")
        return None if last is None else int(last)

    def last_begun(self) -> int:
        """Return the last round whose cohort was drawn; 0 before any."""
        [(last,)] = self._ask("SELECT coalesce(max(round), 0) FROM cohorts")
        return int(last)

    def server_file(self, round: int) -> StateFile:
        """Return the file of the server's state after a round that is over."""
        [found] = self._ask("SELECT state_path, state_sha256 FROM rounds WHERE round = ?", round)
        return StateFile(*found)

    def state_file(self, client: str) -> StateFile | None:
        """Return the file of a client's last committed turn; None before its first."""
        found = self._ask(
            "SELECT state_path, state_sha256 FROM turns WHERE client = ? "
            "ORDER BY round DESC LIMIT 1",
            client,
        )
        return StateFile(*found[0]) if found else None

    def last_summary(self, client: str) -> dict[str, float]:
        """Return the numbers of a client's last committed turn; none before its first."""
        found = self._ask(
            "SELECT summary FROM turns WHERE client = ? ORDER BY round DESC LIMIT 1", client
        )
        return self._numbers(found[0][0]) if found else {}

    def cohort(self, round: int) -> list[str] | None:
        """Return who takes part in a round, in id order; None before it was drawn."""
        rows = self._ask("SELECT client FROM cohorts WHERE round = ? ORDER BY client", round)
        return [client for (client,) in rows] or None

    def waiting(self, round: int) -> list[str]:
        """Return who of a round's cohort has yet to take its turn and may, in id order."""
        rows = self._ask(
            "SELECT client FROM cohorts LEFT JOIN turns USING (round, client) "
            "WHERE round = ? AND state_path IS NULL AND tries < ? ORDER BY client",
            round,
            MOST_TRIES,
        )
        return [client for (client,) in rows]

    def last_fault(self, round: int, client: str) -> str | None:
        """Return the kind of a client's last fault in a round."""
        found = self._ask(
            "SELECT kind FROM faults WHERE round = ? AND client = ? ORDER BY try DESC LIMIT 1",
            round,
            client,
        )
        return str(found[0][0]) if found else None

    def faults(self, round: int) -> dict[str, tuple[str, str]]:
        """Return kind and message of the last fault of each client that had one in a round."""
        rows = self._ask(
            "SELECT client, kind, message FROM faults WHERE round = ? ORDER BY try", round
        )
        return {client: (kind, message) for client, kind, message in rows}

    def turns(self, round: int) -> list[Turn]:
        """Return the turns of a round's cohort, in client-id order."""
        rows = self._ask(
            "SELECT client, upload_path, upload_sha256, bytes_up, summary, seconds FROM turns "
            "JOIN cohorts USING (round, client) WHERE round = ? ORDER BY client",
            round,
        )
        return [
            Turn(client, StateFile(*file) if file[0] else None, up, self._numbers(text), seconds)
            for client, *file, up, text, seconds in rows
        ]

    def scored(self, round: int) -> set[str]:
        """Return the clients that were scored after a round."""
        return {c for (c,) in self._ask("SELECT client FROM scores WHERE round = ?", round)}

    def chosen(self, round: int) -> set[str]:
        """Return the clients whose model was chosen after a round, their final scoring done."""
        return {c for (c,) in self._ask("SELECT client FROM choices WHERE round = ?", round)}

    def validation(self, round: int, candidate: str) -> dict[str, float]:
        """Return one candidate's validation scores after a round, nats a token, by client."""
        rows = self._ask(
            "SELECT client, nll FROM scores "
            "WHERE round = ? AND candidate = ? AND split = 'validation' ORDER BY client",
            round,
            candidate,
        )
        return dict(rows)

    def scores(self) -> Iterator[tuple[int, str, str, str, float]]:
        """Yield every score as (round, client, split, candidate, nll), in that order."""
        return self._each(
            "SELECT round, client, split, candidate, nll FROM scores ORDER BY 1, 2, 3, 4"
        )

    def measured(self) -> Iterator[tuple[int, str, str, str, str, float]]:
        """Yield every number of a score: (round, client, split, candidate, metric, value).

        In that order, but the loss, ``nll``, comes first. Final scores alone have others.
        """
        rows = self._each(
            "SELECT round, client, split, candidate, 0, 'nll', nll FROM scores UNION ALL "
            "SELECT round, client, split, candidate, 1, metric, value FROM metrics "
            "ORDER BY 1, 2, 3, 4, 5, 6"
        )
        return ((*at, metric, value) for *at, _, metric, value in rows)

    def final_metrics(self) -> list[tuple[str, str, str, str, float]]:
        """Return the metrics of each client's choice: (client, split, candidate, metric, value)."""
        return self._ask(
            "SELECT client, split, metrics.candidate, metric, value FROM metrics "
            "JOIN choices USING (client, round) ORDER BY 1, 2, 3, 4"
        )

    def final_scores(self) -> list[tuple[str, str, str, float, int, int]]:
        """Return the scores of each client's choice: (client, split, candidate, nll, rows, tokens).

        That is every candidate on every split, of the round after which the client's model was
        chosen, in the order of client, split and candidate.
        """
        return self._ask(
            "SELECT client, split, scores.candidate, nll, rows, tokens FROM scores "
            "JOIN choices USING (client, round) ORDER BY 1, 2, 3"
        )

    def validation_means(self, own: str) -> list[tuple[int, float]]:
        """Return (round, mean over clients of the validation loss) of the rounds so far.

        In a round that scored several candidates it is that of ``own``, if that is one of them.
        """
        rows = self._ask(
            "SELECT round, avg(nll) FROM (SELECT round, nll, candidate = ? AS own, "
            "count(*) OVER (PARTITION BY round, client) AS several "
            "FROM scores WHERE split = 'validation') WHERE own OR several = 1 "
            "GROUP BY round ORDER BY round",
            own,
        )
        return [(round, mean) for round, mean in rows]

    def costs(self) -> Costs:
        """Return what all turns have taken together."""
        [row] = self._ask(
            "SELECT coalesce(sum(steps), 0), coalesce(sum(bytes_down), 0), "
            "coalesce(sum(bytes_up), 0), coalesce(sum(seconds), 0.0), "
            "(SELECT count(*) FROM faults) FROM turns"
        )
        return Costs(*row)

    def choices(self) -> dict[str, Choice]:
        """Return every client's choice, in id order."""
        from pfl_lm.evaluate import Choice

        rows = self._ask(
            "SELECT client, candidate, reason, margin, standard_error FROM choices ORDER BY client"
        )
        return {client: Choice(*choice) for client, *choice in rows}

    def traffic(self) -> dict[str, tuple[int, int, int]]:
        """Return (turns, bytes down, bytes up) of every client that trained, in id order."""
        rows = self._ask(
            "SELECT client, count(*), sum(bytes_down), sum(bytes_up) FROM turns "
            "GROUP BY client ORDER BY client"
        )
        return {client: (turns, down, up) for client, turns, down, up in rows}

    def live_files(self) -> list[StateFile]:
        """Return every file that is still needed: it must be there, and no other one must."""
        rows = self._ask(
            "SELECT state_path, state_sha256 FROM rounds "
            "WHERE round = (SELECT max(round) FROM rounds) "
            "UNION SELECT state_path, state_sha256 FROM turns AS turn WHERE round = "
            "(SELECT max(round) FROM turns WHERE client = turn.client) "
            "UNION SELECT upload_path, upload_sha256 FROM turns WHERE upload_path IS NOT NULL "
            "AND round > (SELECT coalesce(max(round), -1) FROM rounds)"
        )
        return [StateFile(*row) for row in rows]

    def superseded(self, round: int) -> list[str]:
        """Return the files that the commit of this round's aggregate has made useless.

        Its uploads, the server's state before it, and what its cohort's clients wrote before.
        """
        rows = self._ask(
            "SELECT upload_path FROM turns WHERE round = :round AND upload_path IS NOT NULL "
            "UNION SELECT state_path FROM rounds WHERE round = :round - 1 "
            "UNION SELECT old.state_path FROM turns new JOIN turns old ON old.client = new.client "
            "AND old.round = (SELECT max(round) FROM turns "
            "WHERE client = new.client AND round < :round) WHERE new.round = :round",
            round=round,
        )
        return sorted(path for (path,) in rows)

    def summaries(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Yield whose turn it was and its summary, for every turn in the order of rounds."""
        return ((client, summary) for _, client, summary in self.turn_summaries())

    def turn_summaries(self) -> Iterator[tuple[int, str, dict[str, float]]]:
        """Yield round, client and summary of every turn, in the order of rounds."""
        rows = self._each("SELECT round, client, summary FROM turns ORDER BY round, client")
        return ((round, client, self._numbers(text)) for round, client, text in rows)

    def number(self, key: str) -> float | None:
        """Return a number that the run has noted of itself; None if it has not."""
        text = self.about().get(key)
        try:
            return None if text is None else float(text)
        except ValueError:
            raise RunFolderError(f"{self.path}: {key} is {text!r}, not a number") from None

    def _numbers(self, text: str) -> dict[str, float]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not all(type(x) in (int, float) for x in found.values()):
            raise RunFolderError(f"{self.path}: a turn's summary is not numbers by name")
        return found

    def _ask(self, query: str, *given: object, **named: object) -> list[tuple]:  # type: ignore[type-arg]
        with explained(self.path):
            return self._connection.execute(query, named or given).fetchall()

    def _each(self, query: str) -> Iterator[Any]:
        """Yield rows one by one, where there are as many as clients times rounds."""
        with explained(self.path):
            for row in self._connection.execute(query):  # noqa: UP028
                yield row  # `yield from` would close the cursor, perhaps after the ledger


def client_digest(client: str) -> str:
    """Return what a ledger remembers of the id of a client that was removed."""
    return hashlib.sha256(client.encode()).hexdigest()

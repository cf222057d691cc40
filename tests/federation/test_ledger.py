"""The ledger: a row is there whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from pfl_lm.errors import RunFolderError
from pfl_lm.evaluate import Choice
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.messages import Fault, Score, Update
from pfl_lm.federation.schema import VERSION
from pfl_lm.methods import Upload
from tests.federation.entries import CLIENTS, file, rows, score, scored, turn


def test_a_run_says_what_it_is_and_who_takes_part(ledger: Ledger) -> None:
    assert dict(rows(ledger, "SELECT * FROM run")) == {"name": "tiny", "method": "pflalign"}
    assert ledger.members() == CLIENTS
    assert rows(ledger, "PRAGMA user_version") == [(VERSION,)]


def test_commits_survive_a_power_cut(ledger: Ledger) -> None:
    assert ledger._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_turn_is_one_row_that_names_its_files(ledger: Ledger) -> None:
    assert ledger.state_file("a") is None
    turn(ledger, "a", 1)
    [row] = rows(
        ledger,
        "SELECT round, client, state_path, state_sha256, upload_path, upload_sha256, weight, "
        "steps, bytes_down, bytes_up, summary, seconds FROM turns",
    )
    assert row[:6] == (1, "a", "a-1", "sha-a-1", "up-a-1", "sha-up-a-1")
    assert row[6:10] == (5.0, 4, 40, 4 * 13)
    assert json.loads(str(row[10])) == {"loss_first": 1.0, "loss_last": 0.5}
    assert row[11] == 1.5
    assert ledger.state_file("a") == file("a-1")


def test_the_state_of_a_client_is_that_of_its_last_turn(ledger: Ledger) -> None:
    for round in (1, 2, 10):  # 10 comes after 2: rounds are numbers
        turn(ledger, "a", round)
    turn(ledger, "b", 1)
    assert ledger.state_file("a") == file("a-10")
    assert ledger.state_file("b") == file("b-1")


def test_a_round_names_its_cohort_and_the_servers_state(ledger: Ledger) -> None:
    assert (ledger.last_round(), ledger.last_begun(), ledger.cohort(1)) == (None, 0, None)
    ledger.commit_round(0, file("server-0"))
    ledger.commit_cohort(1, ["b", "a"])
    assert (ledger.last_round(), ledger.last_begun(), ledger.cohort(1)) == (0, 1, ["a", "b"])
    assert ledger.server_file(0) == file("server-0")
    ledger.commit_round(1, file("server-1"))
    assert ledger.last_round() == 1
    assert ledger.server_file(1) == file("server-1")


def test_a_rounds_commit_makes_older_files_useless_and_no_others(ledger: Ledger) -> None:
    """Client b sits out round 2: its state of round 1 is still its last."""
    ledger.commit_round(0, file("server-0"))
    for client in ("a", "b"):
        turn(ledger, client, 1)
    needed = [file(name) for name in ("a-1", "b-1", "server-0", "up-a-1", "up-b-1")]
    assert sorted(ledger.live_files(), key=lambda each: each.path) == needed
    ledger.commit_round(1, file("server-1"))
    assert ledger.superseded(1) == ["server-0", "up-a-1", "up-b-1"]
    assert {each.path for each in ledger.live_files()} == {"a-1", "b-1", "server-1"}
    turn(ledger, "a", 2)
    ledger.commit_round(2, file("server-2"))
    assert ledger.superseded(2) == ["a-1", "server-1", "up-a-2"]
    assert {each.path for each in ledger.live_files()} == {"a-2", "b-1", "server-2"}


def test_who_has_failed_twice_sits_a_round_out(ledger: Ledger) -> None:
    ledger.commit_cohort(1, ["a", "b"])
    assert ledger.waiting(1) == ["a", "b"]
    turn(ledger, "a", 1)
    assert ledger.waiting(1) == ["b"]
    assert ledger.last_fault(1, "b") is None
    assert ledger.commit_fault(1, "b", Fault("memory", "no room")) == 1
    assert (ledger.waiting(1), ledger.last_fault(1, "b")) == (["b"], "memory")
    assert ledger.commit_fault(1, "b", Fault("raised", "a bug")) == 2
    assert (ledger.waiting(1), ledger.last_fault(1, "b")) == ([], "raised")
    assert ledger.faults(1) == {"b": ("raised", "a bug")}
    found = rows(ledger, "SELECT round, client, try, kind, message FROM faults ORDER BY try")
    assert found == [(1, "b", 1, "memory", "no room"), (1, "b", 2, "raised", "a bug")]
    ledger.forgive(1)
    assert ledger.waiting(1) == ["b"]
    assert ledger.commit_fault(1, "b", Fault("raised", "again")) == 1  # and numbered on
    assert rows(ledger, "SELECT max(try) FROM faults") == [(3,)]


def test_a_turn_that_nobody_takes_in_has_no_upload(ledger: Ledger) -> None:
    update = Update(run="tiny", round=3, client="a", upload=Upload({}, 0.0), state=file("a-3"))
    ledger.commit_turn(update, None, bytes_down=4)
    assert ledger.state_file("a") == file("a-3")
    assert ledger.turns(3) == []  # no cohort
    assert ledger.live_files() == [file("a-3")]


def test_an_attempt_says_how_it_ended(ledger: Ledger) -> None:
    killed, done = ledger.begin_attempt(), ledger.begin_attempt()
    ledger.end_attempt(done, "finished")
    found = rows(ledger, "SELECT attempt, outcome, ended IS NULL FROM attempts ORDER BY attempt")
    assert found == [(killed, None, 1), (done, "finished", 0)]


def test_starting_over_forgets_all_but_who_takes_part(ledger: Ledger) -> None:
    ledger.commit_round(0, file("server-0"))
    ledger.commit_cohort(1, ["a", "b"])
    turn(ledger, "a", 1)
    ledger.commit_fault(1, "b", Fault("raised", "a bug"))
    ledger.commit_scores(scored(0, "a", score("base")))
    assert ledger.start_over(learning_rate="0.5") == ["a-1", "server-0", "up-a-1"]
    assert ledger.about()["learning_rate"] == "0.5"
    assert ledger.members() == CLIENTS
    assert ledger.live_files() == list(ledger.scores()) == []
    assert (ledger.last_round(), ledger.cohort(1), ledger.faults(1)) == (None, None, {})


def test_a_client_that_is_removed_leaves_a_digest(ledger: Ledger) -> None:
    ledger.commit_cohort(1, ["a", "b"])
    for client in ("a", "b"):
        turn(ledger, client, 1)
        choice = Choice("local", "why", -0.1, 0.1)
        ledger.commit_scores(scored(1, client, score("local"), choice=choice))
    assert ledger.remove_member("a") == ["a-1", "up-a-1"]
    assert [member.client for member in ledger.members()] == ["b"]
    assert ledger.removed() == {hashlib.sha256(b"a").hexdigest()}
    assert {row[1] for row in ledger.scores()} == ledger.chosen(1) == {"b"}
    assert ledger.cohort(1) == ["b"]
    with closing(sqlite3.connect(ledger.path)) as other:
        tables = [name for (name,) in other.execute("SELECT name FROM sqlite_schema")]
        for table in (t for t in tables if not t.startswith(("sqlite_", "turns_by"))):
            for row in other.execute(f"SELECT * FROM {table}"):
                assert "a" not in row, table


def test_a_commit_that_fails_leaves_nothing_half(ledger: Ledger) -> None:
    """The second of three rows breaks a rule; the first must not stay, nor spoil what follows."""
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit_cohort(1, ["a", "a", "b"])
    assert ledger.cohort(1) is None
    ledger.commit_scores(scored(1, "b", score("local")))
    assert len(rows(ledger, "SELECT * FROM scores")) == 1


def test_a_commit_that_is_interrupted_leaves_nothing_half(ledger: Ledger) -> None:
    def some() -> Iterator[Score]:
        yield score("local")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger._commit(
            ("INSERT INTO run VALUES (?, ?)", [("half", "a run")]),
            ("INSERT INTO scores VALUES (1, 'a', ?, 'x', 1, 1, 1)", ([s.split] for s in some())),  # type: ignore[arg-type]
        )
    assert list(ledger.scores()) == []
    ledger.commit_scores(scored(1, "b", score("local")))
    assert dict(rows(ledger, "SELECT * FROM run")).keys() == {"name", "method"}


def test_a_full_disk_is_said_so_and_leaves_nothing_half(ledger: Ledger) -> None:
    turn(ledger, "a", 1)
    [(pages,)] = ledger._connection.execute("PRAGMA page_count").fetchall()
    ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(RunFolderError) as caught:
        ledger.commit_scores(scored(1, "a", *(score(f"{i:0200}") for i in range(1000))))
    assert str(caught.value) == (
        f"{ledger.path}: cannot be written: database or disk is full\n"
        "  hint: make room on this disk; what was committed before is intact"
    )
    assert list(ledger.scores()) == []
    assert ledger.state_file("a") == file("a-1")
    ledger._connection.execute(f"PRAGMA max_page_count = {pages + 100}")
    ledger.commit_scores(scored(1, "a", score("local")))
    assert len(rows(ledger, "SELECT * FROM scores")) == 1


def test_nothing_is_said_of_strangers(ledger: Ledger) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit_scores(scored(1, "nobody", score("local")))

"""The ledger: a row is there whole, or not at all."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pfl_lm.errors import RunFolderError
from pfl_lm.evaluate import Choice
from pfl_lm.federation.ledger import SCHEMA_VERSION, Ledger
from pfl_lm.federation.messages import Score, StateFile, Update
from pfl_lm.methods import Upload

CLIENTS = [("a", "slug-a", 5, 1, 2), ("b", "slug-b", 7, 1, 0)]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "federation.sqlite")
    opened.open_run({"name": "tiny", "method": "pflalign"}, CLIENTS)
    yield opened
    opened.close()


def rows(ledger: Ledger, query: str) -> list[tuple[object, ...]]:
    """Ask on a connection of its own, which sees what is committed and nothing else."""
    with closing(sqlite3.connect(ledger.path)) as other:
        return other.execute(query).fetchall()


def file(name: str) -> StateFile:
    return StateFile(name, f"sha-{name}")


def turn(ledger: Ledger, client: str, round: int) -> None:
    update = Update(
        run="tiny",
        round=round,
        client=client,
        upload=Upload({"weights": torch.zeros(10), "more": torch.zeros(3)}, weight=5),
        state=file(f"{client}-{round}"),
        steps_done=4,
        summary={"loss_last": 0.5, "loss_first": 1.0},
        seconds=1.5,
    )
    ledger.commit_turn(update, file(f"up-{client}-{round}"), bytes_down=40)


def score(candidate: str, nll: float = 1.25) -> Score:
    return Score("validation", candidate, nll, rows=1, tokens=9)


def test_a_run_says_what_it_is_and_who_takes_part(ledger: Ledger) -> None:
    assert dict(rows(ledger, "SELECT * FROM run")) == {"name": "tiny", "method": "pflalign"}
    assert rows(ledger, "SELECT * FROM clients ORDER BY client") == CLIENTS
    assert rows(ledger, "PRAGMA user_version") == [(SCHEMA_VERSION,)]


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
    ledger.commit_round(0, [], file("server-0"))
    ledger.commit_round(1, ["a", "b"], file("server-1"))
    found = rows(ledger, "SELECT round, cohort, state_path, state_sha256 FROM rounds ORDER BY 1")
    assert found == [
        (0, "[]", "server-0", "sha-server-0"),
        (1, '["a", "b"]', "server-1", "sha-server-1"),
    ]


def test_a_rounds_commit_makes_older_files_useless_and_no_others(ledger: Ledger) -> None:
    """Client b sits out round 2: its state of round 1 is still its last."""
    ledger.commit_round(0, [], file("server-0"))
    turn(ledger, "a", 1)
    turn(ledger, "b", 1)
    ledger.commit_round(1, ["a", "b"], file("server-1"))
    assert ledger.superseded(1) == ["server-0", "up-a-1", "up-b-1"]
    turn(ledger, "a", 2)
    ledger.commit_round(2, ["a"], file("server-2"))
    assert ledger.superseded(2) == ["a-1", "server-0", "server-1", "up-a-2"]


def test_scores_come_in_order_and_to_the_bit(ledger: Ledger) -> None:
    ledger.commit_scores(10, "a", [score("realigned", 0.1 + 0.2)])
    ledger.commit_scores(2, "b", [score("local"), Score("test", "base", math.inf, 2, 5)])
    ledger.commit_scores(2, "a", [score("local"), score("base")])
    assert ledger.scores() == [
        (2, "a", "validation", "base", 1.25),
        (2, "a", "validation", "local", 1.25),
        (2, "b", "test", "base", math.inf),
        (2, "b", "validation", "local", 1.25),
        (10, "a", "validation", "realigned", 0.1 + 0.2),
    ]
    assert rows(ledger, "SELECT rows, tokens FROM scores WHERE split = 'test'") == [(2, 5)]


def test_choices_come_back_as_they_were_in_id_order(ledger: Ledger) -> None:
    first, second = Choice("local", "why", -0.1, math.inf), Choice("base", "why not", 0.0, 0.0)
    ledger.commit_choice("b", first)
    ledger.commit_choice("a", second)
    assert list(ledger.choices().items()) == [("a", second), ("b", first)]


def test_a_second_ledger_of_one_run_is_refused(ledger: Ledger) -> None:
    with pytest.raises(
        RunFolderError, match=r"federation\.sqlite: this folder already holds a run"
    ):
        Ledger(ledger.path)
    assert len(rows(ledger, "SELECT * FROM clients")) == 2


def test_a_place_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be written: unable to open"):
        Ledger(tmp_path / "nowhere" / "federation.sqlite")


def test_a_commit_that_fails_leaves_nothing_half(ledger: Ledger) -> None:
    """The second of three rows breaks a rule; the first must not stay, nor spoil what follows."""
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit_scores(1, "a", [score("local"), score("local"), score("base")])
    assert ledger.scores() == []
    ledger.commit_scores(1, "b", [score("local")])
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
    assert ledger.scores() == []
    ledger.commit_scores(1, "b", [score("local")])
    assert dict(rows(ledger, "SELECT * FROM run")).keys() == {"name", "method"}


def test_a_full_disk_is_said_so_and_leaves_nothing_half(ledger: Ledger) -> None:
    turn(ledger, "a", 1)
    [(pages,)] = ledger._connection.execute("PRAGMA page_count").fetchall()
    ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(RunFolderError) as caught:
        ledger.commit_scores(1, "a", [score(f"{i:0200}") for i in range(1000)])
    assert str(caught.value) == (
        f"{ledger.path}: cannot be written: database or disk is full\n"
        "  hint: make room on this disk; what was committed before is intact"
    )
    assert ledger.scores() == []
    assert ledger.state_file("a") == file("a-1")
    ledger._connection.execute(f"PRAGMA max_page_count = {pages + 100}")
    ledger.commit_scores(1, "a", [score("local")])
    assert len(rows(ledger, "SELECT * FROM scores")) == 1


def test_nothing_is_said_of_strangers(ledger: Ledger) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit_scores(1, "nobody", [score("local")])


def test_closing_leaves_one_file(ledger: Ledger) -> None:
    turn(ledger, "a", 1)
    ledger.close()
    assert [path.name for path in ledger.path.parent.iterdir()] == ["federation.sqlite"]

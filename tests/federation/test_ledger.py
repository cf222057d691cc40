"""The ledger: a row is there whole, or not at all."""

from __future__ import annotations

import hashlib
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
from pfl_lm.federation.history import Costs, Member, StateFile
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.messages import Fault, Score, Update
from pfl_lm.federation.schema import MIGRATIONS, TABLES, VERSION
from pfl_lm.methods import Upload

CLIENTS = [Member("a", "slug-a", 5, 1, 2, "rows-a"), Member("b", "slug-b", 7, 1, 0, "rows-b")]


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


def scored(round: int, client: str, *scores: Score, choice: Choice | None = None) -> Update:
    return Update(run="tiny", round=round, client=client, scores=scores, choice=choice)


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
    assert ledger.live_files() == ledger.scores() == []
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


def test_scores_come_in_order_and_to_the_bit(ledger: Ledger) -> None:
    ledger.commit_scores(scored(10, "a", score("realigned", 0.1 + 0.2)))
    ledger.commit_scores(scored(2, "b", score("local"), Score("test", "base", math.inf, 2, 5)))
    ledger.commit_scores(scored(2, "a", score("local"), score("base")))
    assert ledger.scores() == [
        (2, "a", "validation", "base", 1.25),
        (2, "a", "validation", "local", 1.25),
        (2, "b", "test", "base", math.inf),
        (2, "b", "validation", "local", 1.25),
        (10, "a", "validation", "realigned", 0.1 + 0.2),
    ]
    assert rows(ledger, "SELECT rows, tokens FROM scores WHERE split = 'test'") == [(2, 5)]


def test_final_scores_are_those_of_the_round_of_the_choice(ledger: Ledger) -> None:
    choice = Choice("local", "why", -0.1, 0.1)
    ledger.commit_scores(scored(1, "b", score("global", 9.0)))
    ledger.commit_scores(scored(1, "a", score("global", 9.0)))  # never chosen for
    final = scored(2, "b", score("local", 0.5), score("base", 2.0), choice=choice)
    ledger.commit_scores(final)
    one = final.scores[0]
    assert ledger.final_scores() == [
        ("b", "validation", "base", 2.0, one.rows, one.tokens),
        ("b", "validation", "local", 0.5, one.rows, one.tokens),
    ]


def test_a_curve_is_of_the_methods_own_candidate(ledger: Ledger) -> None:
    """Where a round has scored one candidate, of that; where several, of the one that is asked."""
    choice = Choice("local", "why", -0.1, 0.1)
    for client, nll in (("a", 1.0), ("b", 4.0)):
        ledger.commit_scores(scored(0, client, score("base", 2 * nll)))
        ledger.commit_scores(scored(1, client, score("global", nll)))
        several = (score("local", 0.0), score("global", nll / 2), score("base", 9.0))
        ledger.commit_scores(scored(2, client, *several, choice=choice))
    assert ledger.validation_means("global") == [(0, 5.0), (1, 2.5), (2, 1.25)]


def test_costs_are_summed_over_turns(ledger: Ledger) -> None:
    assert ledger.costs() == Costs(0, 0, 0, 0.0, 0)
    turn(ledger, "a", 1)
    turn(ledger, "b", 2)
    ledger.commit_cohort(1, ["a"])
    ledger.commit_fault(1, "a", Fault("raised", "a bug"))
    expected = Costs(steps=8, bytes_down=80, bytes_up=2 * 13 * 4, seconds=3.0, faults=1)
    assert ledger.costs() == expected


def test_choices_come_back_as_they_were_in_id_order(ledger: Ledger) -> None:
    first, second = Choice("local", "why", -0.1, math.inf), Choice("base", "why not", 0.0, 0.0)
    ledger.commit_scores(scored(2, "b", choice=first))
    ledger.commit_scores(scored(3, "a", choice=second))
    assert list(ledger.choices().items()) == [("a", second), ("b", first)]
    assert (ledger.chosen(2), ledger.chosen(3)) == ({"b"}, {"a"})
    ledger.commit_scores(scored(3, "b", choice=second))  # a run that was extended
    assert (ledger.chosen(2), ledger.chosen(3)) == (set(), {"a", "b"})


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
    assert ledger.scores() == [(1, "a", "validation", "local", 1.25)]
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


def test_a_place_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be written: unable to open"):
        Ledger(tmp_path / "nowhere" / "federation.sqlite")


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
    assert ledger.scores() == []
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
    assert ledger.scores() == []
    assert ledger.state_file("a") == file("a-1")
    ledger._connection.execute(f"PRAGMA max_page_count = {pages + 100}")
    ledger.commit_scores(scored(1, "a", score("local")))
    assert len(rows(ledger, "SELECT * FROM scores")) == 1


def test_nothing_is_said_of_strangers(ledger: Ledger) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit_scores(scored(1, "nobody", score("local")))


def test_closing_leaves_one_file(ledger: Ledger) -> None:
    turn(ledger, "a", 1)
    ledger.close()
    assert [path.name for path in ledger.path.parent.iterdir()] == ["federation.sqlite"]

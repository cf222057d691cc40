"""Run folders that were damaged or made to deceive, given to every verb that takes one.

Each example takes a copy of a real run folder, spoils it in a few ways, and calls the command line.
It may succeed or refuse; it must not break, wait, or touch anything outside the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pfl_lm.cli.app import app
from pfl_lm.finetune import finetune
from pfl_lm.recipe import load_recipe
from tests.hostile.watched import examples
from tests.interruptions import stopped
from tests.same import files_in
from tests.tiny import client_rows, tiny_recipe, write_jsonl

PATIENCE = 60
"""Seconds after which an example hangs."""

TABLES = (
    *("run", "clients", "cohorts", "turns", "faults", "rounds"),
    *("scores", "choices", "removed", "attempts"),
)
VALUES: tuple[Any, ...] = (
    *("", "x", "../../outside", "/etc/hostname", "clients/../../outside/secret", "\x1b[2J\u202e"),
    *("clients/alice/state-1.safetensors", "server/state-0.safetensors", "nan", "1e999", "9" * 400),
    *(0, -1, 1, 2, 3, 2**62, 1.5, float("inf"), b"\xff\x00", None),
    *("[" * 2000, '{"a": "b"}', "{}", "null", "uploads/2/bob.safetensors"),
)
Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run and one that was stopped within a round, each in a place of its own."""
    done = tmp_path_factory.mktemp("finished")
    finetune(load_recipe(tiny_recipe(done)))
    half = tmp_path_factory.mktemp("stopped")
    stopped(half, 26)
    return {"finished": done, "stopped": half}


# --- ways to spoil a run folder -----------------------------------------------------------------


def pick(folder: Path, index: int) -> Path:
    """Return one file of the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return files[index % len(files)]


def cut(index: int, share: float) -> Spoil:
    def spoil(folder: Path) -> None:
        path = pick(folder, index)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return spoil


def flip(index: int, share: float, bit: int) -> Spoil:
    def spoil(folder: Path) -> None:
        path = pick(folder, index)
        content = bytearray(path.read_bytes())
        if content:
            content[int(share * (len(content) - 1))] ^= 1 << bit
            path.write_bytes(content)

    return spoil


def overwrite(index: int, content: bytes) -> Spoil:
    return lambda folder: pick(folder, index).write_bytes(content) and None


def swap(one: int, other: int) -> Spoil:
    def spoil(folder: Path) -> None:
        a, b = pick(folder, one), pick(folder, other)
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)

    return spoil


def replace(index: int, what: str) -> Spoil:
    """Put a link, a pipe, a folder or nothing in the place of a file, or of its folder."""

    def spoil(folder: Path) -> None:
        path = pick(folder, index)
        if what == "linked folder":
            if path.parent == folder:
                return
            shutil.rmtree(path.parent)
            path.parent.symlink_to(folder.parents[1] / "outside")
            return
        path.unlink()
        match what:
            case "link":
                path.symlink_to(folder.parents[1] / "outside" / "secret")
            case "pipe":
                os.mkfifo(path)
            case "folder":
                path.mkdir()

    return spoil


def rewrite(table: str, column: int, value: Any, where: int) -> Spoil:
    """Write a value into the ledger, in whatever way SQLite lets one."""

    def spoil(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
            try:
                columns = [row[1] for row in ledger.execute(f"PRAGMA table_info({table})")]
                name = columns[column % len(columns)]
                ids = [row[0] for row in ledger.execute(f"SELECT rowid FROM {table}")]
                if ids:
                    row = ids[where % len(ids)]
                    ledger.execute(f"UPDATE {table} SET {name} = ? WHERE rowid = ?", (value, row))
                ledger.commit()
            except (sqlite3.Error, OverflowError):
                pass  # this one SQLite itself refuses

    return spoil


def execute(statement: str) -> Spoil:
    def spoil(folder: Path) -> None:
        ledger = folder / "federation.sqlite"
        with suppress(sqlite3.Error), closing(sqlite3.connect(ledger)) as connection:
            connection.executescript(statement)

    return spoil


def other_state(index: int, how: str) -> Spoil:
    """Write another state and its SHA-256 into the ledger: a forgery that fits together."""

    def spoil(folder: Path) -> None:
        import hashlib

        import torch

        states = sorted(folder.glob("*/**/*.safetensors"))
        states = [path for path in states if path.parts[-2] not in ("global",)]
        states = [path for path in states if "adapters" not in path.parts]
        if not states:
            return
        path = states[index % len(states)]
        try:
            tensors = load_file(path)
        except Exception:
            return
        name = sorted(tensors)[0] if tensors else "weights"
        match how:
            case "fewer":
                tensors.pop(name, None)
            case "shorter":
                tensors[name] = torch.zeros(3)
            case "double":
                tensors[name] = torch.zeros(3, 3, dtype=torch.float64)
            case "nan":
                tensors[name] = torch.full_like(tensors.get(name, torch.zeros(1)), torch.nan)
            case "other":
                tensors = {"something": torch.zeros(2)}
        metadata = {"scalars": {"fewer": "{}", "shorter": "[1]"}.get(how, '{"weight": "x"}')}
        save_file(tensors, path, metadata=None if how == "double" else metadata)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        place = path.relative_to(folder).as_posix()
        update = "UPDATE {0} SET {1}_sha256 = '{2}' WHERE {1}_path = '{3}';"
        tables = (("turns", "state"), ("turns", "upload"), ("rounds", "state"))
        execute("".join(update.format(t, kind, sha256, place) for t, kind in tables))(folder)

    return spoil


index, share = st.integers(0, 40), st.floats(0, 1)
SPOILS: st.SearchStrategy[Spoil] = st.one_of(
    st.builds(cut, index, share),
    st.builds(flip, index, share, st.integers(0, 7)),
    st.builds(
        overwrite, index, st.sampled_from([b"", b"\x00" * 64, b"{}", b"[" * 9999, b"a: &a [*a]"])
    ),
    st.builds(swap, index, index),
    st.builds(
        replace, index, st.sampled_from(["link", "pipe", "folder", "nothing", "linked folder"])
    ),
    st.builds(
        rewrite,
        st.sampled_from(TABLES),
        st.integers(0, 12),
        st.sampled_from(VALUES),
        st.integers(0, 9),
    ),
    st.builds(
        execute,
        st.sampled_from(
            [
                *(f"DELETE FROM {table};" for table in TABLES),
                *(f"DROP TABLE {table};" for table in TABLES),
                "PRAGMA user_version = 99;",
                "PRAGMA user_version = 1;",
                "PRAGMA user_version = 0;",
                "CREATE TRIGGER t AFTER INSERT ON turns BEGIN DELETE FROM turns; END;",
                "CREATE VIEW v AS SELECT 1;",
                "DROP TABLE turns; CREATE TABLE turns (round, client, state_path);",
                "INSERT INTO cohorts VALUES (99, 'alice', 0);",
                "INSERT INTO rounds VALUES (7, 'server/state-2.safetensors', 'x', 0);",
                "UPDATE clients SET joined = 5;",
                "UPDATE clients SET data_path = '/dev/zero', rows_sha256 = 'x';",
                "UPDATE clients SET slug = '../outside' WHERE client = 'bob';",
            ]
        ),
    ),
    st.builds(
        other_state,
        index,
        st.sampled_from(["fewer", "shorter", "double", "nan", "other", "scalars"]),
    ),
)
VERBS: dict[str, Callable[[Path], list[str]]] = {
    "resume": lambda run: ["resume", str(run)],
    "more": lambda run: ["resume", str(run), "--rounds", "3"],
    "finetune": lambda run: ["finetune", str(run.parents[1] / "recipe.yaml"), "--resume"],
    "remove": lambda run: ["remove", str(run), "--id", "bob"],
    "join": lambda run: [
        *("join", str(run), "--id", "dora", "--data", str(run.parents[1] / "dora.jsonl")),
    ],
    "diagnose": lambda run: ["diagnose", str(run), "--samples", "1"],
    "push": lambda run: ["push", str(run), "--repo", "org/name", "--dry-run"],
}


# --- the property -------------------------------------------------------------------------------


@contextmanager
def in_time() -> Iterator[None]:
    def late(*given: Any) -> None:
        raise TimeoutError("this example hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outside_of(place: Path) -> dict[str, bytes]:
    """Return all that is in a world but in its run folder; links and pipes as such."""
    found = {}
    for path in sorted(place.rglob("*")):
        if path.is_relative_to(place / "runs" / "tiny"):
            continue
        if path.is_file() and not path.is_symlink():
            found[str(path)] = path.read_bytes()
    return found


def check(place: Path, spoils: list[Spoil], verb: str) -> None:
    (place / "outside").mkdir()
    (place / "outside" / "secret").write_text("secret")
    write_jsonl(place / "dora.jsonl", client_rows(("dora",)))
    folder = place / "runs" / "tiny"
    for spoil in spoils:
        with suppress(OSError, ZeroDivisionError, sqlite3.Error):  # what an earlier one took away
            spoil(folder)
    before = outside_of(place)
    with in_time():
        result = CliRunner().invoke(app, VERBS[verb](folder))
    event(f"{verb} ends with {result.exit_code}")
    told = f"{verb}: exit {result.exit_code}\n{result.stderr}"
    assert result.exit_code in (0, 2), told
    assert "Traceback" not in result.stderr, told
    assert "this is a bug" not in result.stderr, told
    assert all(c == "\n" or c.isprintable() for c in result.stderr), told
    assert outside_of(place) == before, told


def placed(world: Path, place: Path) -> Path:
    """Copy a world, and let its recipe and ledger know where it is."""
    shutil.copytree(world, place)
    old, new = str(world), str(place)
    for name in ("recipe.yaml", "runs/tiny/recipe.yaml", "runs/tiny/recipe.resolved.yaml"):
        path = place / name
        path.write_text(path.read_text().replace(old, new))
    with closing(sqlite3.connect(place / "runs/tiny/federation.sqlite")) as ledger:
        ledger.execute("UPDATE run SET value = replace(value, ?, ?)", (old, new))
        ledger.commit()
    return place


@examples(60)
@given(
    kind=st.sampled_from(["finished", "stopped"]),
    spoils=st.lists(SPOILS, min_size=1, max_size=3),
    verb=st.sampled_from(sorted(VERBS)),
)
def test_no_run_folder_breaks_us(
    worlds: dict[str, Path], tmp_path: Path, kind: str, spoils: list[Spoil], verb: str
) -> None:
    number = len(list(tmp_path.iterdir()))
    place = placed(worlds[kind], tmp_path / f"{number:04}")
    try:
        check(place, spoils, verb)
    finally:
        for path in place.rglob("*"):
            if path.is_symlink():
                path.unlink()
        shutil.rmtree(place)
        (tmp_path / f"{number:04}").touch()  # the count goes on


def test_an_unspoilt_world_is_gone_on_with(worlds: dict[str, Path], tmp_path: Path) -> None:
    """So that the examples above do not all end at a check that nothing passes."""
    for kind in worlds:
        for verb in VERBS:
            place = placed(worlds[kind], tmp_path / f"{kind}-{verb}")
            write_jsonl(place / "dora.jsonl", client_rows(("dora",)))
            result = CliRunner().invoke(app, VERBS[verb](place / "runs" / "tiny"))
            expected = 2 if (kind, verb) == ("stopped", "push") else 0
            assert result.exit_code == expected, (kind, verb, result.stderr)
            assert files_in(place)

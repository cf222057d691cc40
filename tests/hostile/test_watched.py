"""What the watch over the command line would see, if it happened."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

import tests.hostile.watched
from pfl_lm.errors import DataError
from tests.hostile.watched import TookTooLong, Watched


def _raise(error: Exception) -> None:
    raise error


def _write_and_remove(name: str) -> None:
    Path(name).write_text("x")
    Path(name).unlink()


def _touch_with_c() -> None:
    import sqlite3

    sqlite3.connect("new.sqlite").execute("CREATE TABLE a (b)")


HARM: dict[str, tuple[Callable[[], object], str]] = {
    "a bug": (lambda: _raise(ValueError("x")), "exit code 1"),
    "raw bytes": (lambda: typer.echo("\x1b[2J"), "acts on a terminal"),
    "a turn": (lambda: typer.echo("a\u202eb", err=True), "acts on a terminal"),
    "a flood": (lambda: typer.echo("x" * 100_000), "100001 characters"),
    "a traceback": (lambda: typer.echo("Traceback (most"), "Traceback"),
    "a file": (lambda: Path("new").write_text("x"), "written: "),
    "a file that is gone again": (lambda: _write_and_remove("new"), "written: "),
    "a file elsewhere": (lambda: _write_and_remove("/dev/shm/pfl-lm-test"), "/dev/shm/pfl-lm"),
    "a file by number": (lambda: os.close(os.open("new", os.O_WRONLY | os.O_CREAT)), "written: "),
    "a file by a library in C": (_touch_with_c, "something has changed"),
    "a folder": (lambda: Path("new").mkdir(), "written: "),
    "a link": (lambda: Path("new").symlink_to("x"), "written: "),
    "a name": (lambda: Path("there").rename("new"), "written: "),
    "a mode": (lambda: Path("there").chmod(0o600), "written: "),
    "a program": (lambda: subprocess.run([sys.executable, "-V"], check=True), "subprocess.Popen"),
    "a wait": (lambda: time.sleep(60), "still running"),
}


@pytest.mark.parametrize("case", HARM)
def test_harm_is_seen(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    do, said = HARM[case]
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    watched = Watched(tmp_path)
    monkeypatch.setattr("pfl_lm.cli.validate.validate", lambda *_: do())
    monkeypatch.setattr(tests.hostile.watched, "PATIENCE_S", 0.2)
    with pytest.raises((AssertionError, TookTooLong), match=said):
        watched.run("validate", "x")


def test_a_refusal_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = DataError("\x9b2J\x1b[2J")
    monkeypatch.setattr("pfl_lm.cli.validate.validate", lambda *_: _raise(error))
    watched = Watched(tmp_path)

    assert watched.run("validate", "x") == (2, "", "\\x9b2J\\x1b[2J\n")
    assert (watched.tried, watched.refused) == (1, 1)


def test_what_is_fine_is_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    watched = Watched(tmp_path, writable=(tmp_path / "runs",))
    monkeypatch.setattr("pfl_lm.cli.validate.validate", lambda *_: Path("runs/new").touch())

    assert watched.run("validate", "x") == (0, "", "")
    assert (watched.tried, watched.refused) == (1, 0)


def test_a_link_does_not_hide_where_a_file_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/link").symlink_to("..")
    watched = Watched(tmp_path, writable=(tmp_path / "runs",))
    monkeypatch.setattr("pfl_lm.cli.validate.validate", lambda *_: _write_and_remove("runs/link/x"))

    with pytest.raises(AssertionError, match="written: "):
        watched.run("validate", "x")

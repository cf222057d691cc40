"""The command line, run on input that may have been made to do harm, and watched while it runs."""

from __future__ import annotations

import os
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
from typer.testing import CliRunner

from pfl_lm.cli.app import app

PATIENCE_S = 30
"""How long one example may take on a machine that others use too."""
LONGEST = 60_000
"""How many characters may be said of one input, however large it is."""

TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

Tree = dict[str, tuple[int, ...]]


class TookTooLong(BaseException):
    """The time limit of one example is over; nothing that catches an Exception may catch this."""


@dataclass
class Watched:
    """A folder, and the runs of the command line in it.

    Attributes:
        root: all that a run may look at lies below it.
        tried: how many inputs were run.
        refused: how many of them were refused.
        seconds: how long the runs took.
    """

    root: Path
    tried: int = 0
    refused: int = 0
    seconds: float = 0.0
    writable: tuple[Path, ...] = ()
    _runner: CliRunner = field(default_factory=CliRunner)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run pfl-lm, hold it to what holds for any input, and return (code, stdout, stderr)."""
        before = tree(self.root, self.writable)
        start = time.perf_counter()
        with time_limit(PATIENCE_S), writes() as written:
            result = self._runner.invoke(app, arguments, color=True)
        self.seconds += time.perf_counter() - start
        self.tried += 1
        assert result.exit_code in (0, 2), f"exit code {result.exit_code}: {result.stderr[:500]}"
        self.refused += result.exit_code == 2
        said = result.stdout + result.stderr
        assert "Traceback" not in said, said[-500:]
        assert not [c for c in said if acts(c)], f"acts on a terminal: {said[:500]!r}"
        assert len(said) <= LONGEST, f"{len(said)} characters: {said[:500]}"
        if result.exit_code == 2:
            assert result.stderr
        astray = [each for each in written if not self._may_write(each)]
        assert not astray, f"written: {astray}"
        assert tree(self.root, self.writable) == before, "something has changed"
        return result.exit_code, result.stdout, result.stderr

    def _may_write(self, path: str) -> bool:
        return any(Path(path).is_relative_to(folder) for folder in self.writable)


def acts(letter: str) -> bool:
    """Say whether a character does something to a terminal, other than to end a line."""
    acting = unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in TURNS
    return acting and letter != "\n"


def tree(root: Path, without: tuple[Path, ...] = ()) -> Tree:
    """Return everything below a folder, links as such, with what changes if it is changed."""
    found: Tree = {}
    waiting = [str(root)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if Path(entry.path) in without:
                    continue
                status = entry.stat(follow_symlinks=False)
                found[entry.path] = (status.st_mode, status.st_ino, status.st_mtime_ns)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    found[entry.path] += (status.st_size,)
    return found


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what is inside if it takes longer, even if it waits for somebody."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_written: list[str] | None = None
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ONE_PATH = {"os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime"}
_TWO_PATHS = {"os.rename", "os.link", "os.symlink"}
_NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class"}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _written is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writing = flags & _WRITING if mode is None else set("wax+") & set(mode)
        if writing and isinstance(path, str | bytes) and "__pycache__" not in str(path):
            _written.append(_absolute(path))
    elif event in _ONE_PATH or event in _TWO_PATHS:
        paths = arguments[: 1 if event in _ONE_PATH else 2]
        # A number is a file that is open, and was noted then.
        _written.extend(_absolute(path) for path in paths if not isinstance(path, int))
    elif event in _NEVER:
        _written.append(f"{event} {arguments!r:.200}")


def _absolute(path: str | bytes) -> str:
    return str(Path(os.fsdecode(path)).resolve())


@contextmanager
def writes() -> Iterator[list[str]]:
    """Collect every path that Python code writes to, wherever it is, and every other process."""
    global _written
    _install()
    _written = seen = []
    try:
        yield seen
    finally:
        _written = None


def _install(done: list[bool] = []) -> None:  # noqa: B006 - once in a process; hooks stay
    if not done:
        sys.addaudithook(_hook)
        done.append(True)


def examples(n: int) -> Callable[[Any], Any]:
    """Return settings for ``n`` examples, the same ones at every run."""
    return hypothesis.settings(
        max_examples=int(os.environ.get("HOSTILE", "1")) * n,
        derandomize="HOSTILE" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )


def report(watched: Watched, at_least: int) -> None:
    """Print how many inputs there were, and hold that they were not all refused, or all fine."""
    print(f"{watched.tried} inputs, {watched.refused} refused, {watched.seconds:.1f} s")
    assert watched.tried >= at_least
    assert 0 < watched.refused < watched.tried

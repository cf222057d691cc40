"""Where in a run a process is, and how it is ended at a chosen call.

A `Spy` wraps what a run does while nothing runs yet; every process that is forked afterwards says
where it is and counts its calls on a `Board` that outlives it.
"""

from __future__ import annotations

import functools
import mmap
import os
import signal
import sqlite3
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pfl_lm.export.adapters
import pfl_lm.export.folders
import pfl_lm.federation.opening
import pfl_lm.federation.store
import pfl_lm.finetune
import pfl_lm.report.metrics
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.rounds import Orchestrator
from pfl_lm.federation.store import Store
from pfl_lm.methods import METHODS

POINTS = ("fsync", "replace", "commit", "fault", "unlink", "aggregate", "export", "metrics")
"""Calls at which a process can be ended."""

TOLD = "turns told"
"""Turns of which the ledger has said that they are committed."""

_COUNTED = (*POINTS, TOLD)

How = Literal["before", "after", "torn"]
HOW: tuple[How, ...] = ("before", "after", "torn")
_TEXT = 80


@dataclass(frozen=True, slots=True)
class Blow:
    """The end of a process at its ``k``-th call of one kind.

    ``torn``: what the call was about to make whole is left half there. Of a file that is about to
    be synced half is cut off; of the write-ahead log, a part of the transaction just committed.
    """

    point: str
    k: int
    how: How

    def __str__(self) -> str:
        return f"{self.how} {self.point}"


class Board:
    """A few bytes of memory that a parent shares with what it forks."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _TEXT + 4 * len(_COUNTED))
        self._within: list[str] = []
        self.clear()

    def clear(self) -> None:
        """Begin anew, in the parent."""
        self._memory[:] = bytes(len(self._memory))
        self._within = ["starting"]
        self._show()

    @property
    def where(self) -> str:
        """What the last child was doing: the innermost two, or the one."""
        return self._memory[:_TEXT].rstrip(b"\0").decode()

    @property
    def counts(self) -> dict[str, int]:
        """How often the last child has come to each point, and how many turns it was told of."""
        counts = struct.unpack_from(f"<{len(_COUNTED)}I", self._memory, _TEXT)
        return dict(zip(_COUNTED, counts, strict=True))

    def count(self, point: str) -> int:
        """Count one more call and return how many there have been."""
        place = _TEXT + 4 * _COUNTED.index(point)
        [n] = struct.unpack_from("<I", self._memory, place)
        struct.pack_into("<I", self._memory, place, n + 1)
        return n + 1

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Say that a child is at something while the body runs."""
        self._within.append(phase)
        self._show()
        try:
            yield
        finally:
            self._within.pop()
            if phase == "rounds":
                self._within[0] = "ending"
            self._show()

    def _show(self) -> None:
        within = self._within
        if len(within) > 1:  # where the innermost lie goes without saying
            within = [phase for phase in within if phase not in ("starting", "rounds", "ending")]
        within = within or ["between turns"]
        self._memory[:_TEXT] = "/".join(within[-2:]).encode().ljust(_TEXT, b"\0")


class Spy:
    """Follows every process that is forked from here on, and ends it where ``blow`` says.

    Args:
        before_end: what is done before the process is killed.
    """

    def __init__(self, before_end: Callable[[], None] = lambda: None) -> None:
        self.board = Board()
        self.blow: Blow | None = None
        self._before_end = before_end
        for owner, name, phase in _PHASES:
            self._patch(owner, name, functools.partial(self._during, phase))
        for owner, name, point, tear in _CALLS:
            self._patch(owner, name, functools.partial(self._at, point, tear))
        self._patch(sqlite3, "connect", self._connecting)
        self._patch(Ledger, "commit_turn", self._telling)

    def end(self) -> None:
        """End this process; nothing of it runs any more."""
        self._before_end()
        os.kill(os.getpid(), signal.SIGKILL)

    def _patch(self, owner: Any, name: str, wrapped: Callable[[Any], Any]) -> None:
        call = getattr(owner, name)
        setattr(owner, name, functools.wraps(call)(wrapped(call)))

    def _during(self, phase: str, call: Any) -> Any:
        def watched(*given: Any, **named: Any) -> Any:
            with self.board.within(phase):
                return call(*given, **named)

        return watched

    def _telling(self, call: Any) -> Any:
        def watched(*given: Any, **named: Any) -> None:
            call(*given, **named)
            self.board.count(TOLD)

        return watched

    def _at(self, point: str, tear: Callable[..., None] | None, call: Any) -> Any:
        def watched(*given: Any, **named: Any) -> Any:
            how = self._due(point)
            if how == "torn" and tear is not None:
                tear(*given)
            if how in ("before", "torn"):
                self.end()
            done = call(*given, **named)
            if how == "after":
                self.end()
            return done

        return watched

    def _connecting(self, connect: Any) -> Any:
        spy = self

        class Spied(sqlite3.Connection):
            def execute(self, sql: str, *given: Any) -> sqlite3.Cursor:
                if sql != "COMMIT":
                    return super().execute(sql, *given)
                how = spy._due("commit")
                if how == "before":
                    spy.end()
                _, _, path = super().execute("PRAGMA database_list").fetchone()
                before = _size(f"{path}-wal")
                done = super().execute(sql, *given)
                if how == "torn" and (after := _size(f"{path}-wal")) > before:
                    os.truncate(f"{path}-wal", (before + after) // 2)
                if how in ("torn", "after"):
                    spy.end()
                return done

        return functools.partial(connect, factory=Spied)

    def _due(self, point: str) -> How | None:
        n = self.board.count(point)
        blow = self.blow
        return blow.how if blow is not None and (blow.point, blow.k) == (point, n) else None


def _cut(descriptor: int) -> None:
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode):
        os.ftruncate(descriptor, about.st_size // 2)


def _size(path: str) -> int:
    return Path(path).stat().st_size if Path(path).exists() else 0


_WRITERS = (
    pfl_lm.federation.opening,
    pfl_lm.federation.store,
    pfl_lm.export.adapters,
    pfl_lm.export.folders,
    pfl_lm.report.metrics,
)
_PHASES: list[tuple[Any, str, str]] = [
    (pfl_lm.finetune, "load_backbone", "loading"),
    (pfl_lm.finetune, "Adapter", "loading"),
    *((Ledger, name, "opening") for name in ("__init__", "open_run", "close")),
    *((Store, name, "opening") for name in ("check", "sweep")),
    (Store, "discard", "tidying"),
    (Orchestrator, "run", "rounds"),
    (ClientSide, "_train", "training"),
    (ClientSide, "_evaluate", "scoring"),
    (ClientSide, "_finish", "final scoring"),
    *((method, "aggregate", "aggregating") for method in METHODS.values()),
    (Ledger, "_commit", "committing"),
    *((module, "write_atomically", "writing") for module in _WRITERS),
    (pfl_lm.finetune, "export_adapters", "exporting"),
    (pfl_lm.finetune, "write_metrics", "reporting"),
]
_CALLS: list[tuple[Any, str, str, Callable[..., None] | None]] = [
    (os, "fsync", "fsync", _cut),
    (Path, "replace", "replace", None),
    (Path, "unlink", "unlink", None),
    (Ledger, "commit_fault", "fault", None),
    *((method, "aggregate", "aggregate", None) for method in METHODS.values()),
    (pfl_lm.export.adapters, "export_adapter", "export", None),
    (pfl_lm.finetune, "write_metrics", "metrics", None),
]

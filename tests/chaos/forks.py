"""Runs that are killed, again and again, and gone on with until they end.

    python -m tests.chaos.forks [--kills 200] [--power-cuts] [--seed SEED] [--folder FOLDER]

One process imports everything once and forks one for each attempt, which does what a person types,
``pfl-lm finetune RECIPE --resume``. Half of the attempts are killed after a time drawn over what an
uninterrupted run takes; half kill themselves at a call drawn among those that it makes, before it,
after it or in the midst of it (`moments`). Half of the attempts that go on are killed as well. In
the end every file and every row must be those of a run that nobody disturbed, and every turn that
was committed when a process died must still be that very row.

With ``--power-cuts`` the runs lie on a file system that loses, at the same moment, whatever was not
synced.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from pfl_lm.cli.exits import exits
from tests.chaos.moments import HOW, POINTS, TOLD, Blow, Spy
from tests.chaos.runs import VARIANTS, Variant
from tests.disks import Ext4
from tests.same import check_same

APART = ("logs/", "federation.lock")
"""What may differ: TensorBoard's files, and a lock that was left by a process killed at its end."""

_PATIENCE = 300.0
"""Seconds after which an attempt has hung."""


class FailedError(AssertionError):
    """An attempt that nobody has killed did not end well."""


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: its length in seconds and how often it came to each point.

    ``before`` is a copy of the finished run that it adds rounds to, if it does.
    """

    folder: Path
    before: Path
    seconds: float
    counts: dict[str, int]


@dataclass
class Tally:
    """How many kills there were, by what and where."""

    kills: int = 0
    attempts: int = 0
    trials: int = 0
    by: Counter[str] = field(default_factory=Counter)
    where: Counter[str] = field(default_factory=Counter)
    variants: Counter[str] = field(default_factory=Counter)

    def add(self, by: str, where: str, variant: str) -> None:
        self.kills += 1
        self.by[by] += 1
        self.where[where] += 1
        self.variants[variant] += 1


class Forks:
    """Forks attempts. Needs a process with one thread, and nothing that runs in it.

    Args:
        log: where what an attempt says goes.
        disk: if there is one, the runs lie on it, and every kill is a power cut.
    """

    def __init__(self, log: Path, disk: Ext4 | None = None) -> None:
        self.log, self.disk = log, disk
        self.cut = disk.cut_power if disk else lambda: None
        self.spy = Spy(self.cut)

    def attempt(
        self, work: Callable[[], None], *, seconds: float | None = None, blow: Blow | None = None
    ) -> bool:
        """Do some work in a process of its own; return whether it came to its end.

        Args:
            seconds: after which it is killed.
            blow: where it kills itself.

        Raises:
            FailedError: it has ended in another way.
        """
        self.spy.board.clear()
        child = os.fork()
        if child == 0:
            os._exit(self._work(work, blow))
        handle = os.pidfd_open(child)
        late = not select.select([handle], [], [], _PATIENCE if seconds is None else seconds)[0]
        if late:
            self.cut()
            os.kill(child, signal.SIGKILL)
        os.close(handle)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if (late and seconds is not None) or (blow and code == -signal.SIGKILL):
            if self.disk is not None:
                self.disk.unmount()
                self.disk.mount()
            return False
        if code:
            raise FailedError(f"an attempt has ended with {code}\n{self.log.read_text()[-3000:]}")
        return True

    def _work(self, work: Callable[[], None], blow: Blow | None) -> int:
        self.spy.blow = blow
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(log, stream)
            with exits(debug=True):
                work()
        except typer.Exit as error:
            return error.exit_code
        except BaseException:
            traceback.print_exc()
            return 3
        finally:
            sys.stdout.flush()
        return 0

    def whole(self, variant: Variant, place: Path) -> Whole:
        """Run one without an interruption, and measure it."""
        folder = variant.write(place)
        before = place / "before"
        if variant.more is not None:
            self.attempt(lambda: variant.prepare(place, folder))
            shutil.copytree(folder, before)
        began = time.perf_counter()
        self.attempt(lambda: variant.go_on(place, folder))
        return Whole(folder, before, time.perf_counter() - began, self.spy.board.counts)

    def trial(
        self, name: str, whole: Whole, place: Path, draw: random.Random, tally: Tally, kills: int
    ) -> None:
        """Run one that is killed up to ``kills`` times, and compare it with the whole one."""
        variant = VARIANTS[name]
        folder = variant.write(place, None if self.disk is None else self.disk.folder / place.name)
        if whole.before.exists():
            shutil.copytree(whole.before, folder)
            subprocess.run(["sync", "-f", str(folder)], check=True)
        committed: set[tuple[Any, ...]] = set()
        told, story = 0, list[str]()
        tally.trials += 1
        try:
            while True:
                end = _drawn_end(draw, whole) if len(story) < kills else {}
                tally.attempts += 1
                if self.attempt(lambda: variant.go_on(place, folder), **end):
                    break
                by, where = str(end.get("blow") or "at a time"), self.spy.board.where
                tally.add(by, where, name)
                story.append(f"killed {by} while {where} ({end})")
                told += self.spy.board.counts[TOLD]
                if not variant.starts_over:
                    committed |= _turns(folder)
                    assert len(committed) >= told, "a committed turn is gone"
                if draw.random() < 0.5:
                    kills = 0
            check_same(folder, whole.folder, apart=APART)
            assert committed <= _turns(folder), "a committed turn was taken back or done again"
        except BaseException:
            print(f"{name}, in {place}:", *story, sep="\n  ", file=sys.stderr)
            raise
        shutil.rmtree(folder)
        shutil.rmtree(place)


def _drawn_end(draw: random.Random, whole: Whole) -> dict[str, Any]:
    if draw.random() < 0.5:
        return {"seconds": draw.uniform(0, whole.seconds)}
    point = draw.choice([each for each in POINTS if whole.counts[each]])
    how = draw.choice(HOW if point in ("fsync", "commit") else HOW[:2])
    # What goes on makes fewer calls than what begins, so early ones are drawn more often.
    return {"blow": Blow(point, 1 + int(whole.counts[point] * draw.random() ** 1.5), how)}


def _turns(folder: Path) -> set[tuple[Any, ...]]:
    """Return every committed turn with its clock, from a copy: looking changes nothing."""
    ledger = folder / "federation.sqlite"
    if not ledger.exists():
        return set()
    with tempfile.TemporaryDirectory() as place:
        for path in folder.glob("federation.sqlite*"):
            shutil.copy(path, place)
        with closing(sqlite3.connect(Path(place) / ledger.name)) as copy:
            if not copy.execute("SELECT 1 FROM sqlite_schema WHERE name = 'turns'").fetchall():
                return set()
            assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            return set(copy.execute("SELECT round, client, state_sha256, at FROM turns"))


def warm_up() -> None:
    """Import everything that a run imports, without starting a thread."""
    import lightning.pytorch.loggers  # noqa: F401
    import torch
    import tqdm
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    from pfl_lm.model.adapter import Adapter
    from pfl_lm.model.backbone import load_backbone
    from pfl_lm.recipe import AdapterOptions, BackboneOptions
    from tests.tiny import tiny_model

    tqdm.tqdm.monitor_interval = 0  # its monitor is a thread
    torch.set_num_threads(1)
    place = {"model_name_or_path": str(tiny_model()), "dtype": "float32"}
    backbone = load_backbone(BackboneOptions.model_validate(place), torch.device("cpu"))
    Adapter(backbone, AdapterOptions(), seed=0)


def threads() -> int:
    """Return how many threads this process has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Threads:"))


def chaos(
    kills: int, seed: str, place: Path, names: Iterable[str], disk: Ext4 | None = None
) -> Tally:
    """Kill so many attempts, over runs of the variants named in turn.

    Raises:
        AssertionError: a run did not end as one that was left alone.
    """
    warm_up()
    assert threads() == 1, "a process with threads cannot be forked"
    forks, tally = Forks(place / "log", disk), Tally()
    wholes: dict[str, Whole] = {}
    names = list(names)
    while tally.kills < kills:
        name = names[tally.trials % len(names)]
        if name not in wholes:
            wholes[name] = forks.whole(VARIANTS[name], place / f"whole {len(wholes)}")
        draw = random.Random(f"{seed} {tally.trials}")
        trial = place / f"trial {tally.trials}"
        forks.trial(name, wholes[name], trial, draw, tally, min(6, kills - tally.kills))
    return tally


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--power-cuts", action="store_true")
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(10**6)))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="only the first few")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="pfl-lm-chaos-") as folder:
        place = Path(folder)
        disk = Ext4(place) if given.power_cuts else None
        try:
            tally = chaos(given.kills, given.seed, place, [*VARIANTS][: given.variants], disk)
        finally:
            if disk is not None:
                disk.unmount()
    told = {
        "seed": given.seed,
        "kills": tally.kills,
        "attempts": tally.attempts,
        "runs": tally.trials,
        "seconds": round(time.perf_counter() - began),
        **{name: dict(getattr(tally, name).most_common()) for name in ("by", "where", "variants")},
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()

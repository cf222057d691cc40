"""Two ranks that take clients of their own, against one process with one thread.

    python -m tests.benchmarks.ranks [--tiny] [--repeats N]
    python -m tests.benchmarks.ranks --schedule

Needs as many cores with nothing else to do as there are ranks. The quickstart, or with ``--tiny``
the tests' backbone, is run ``--repeats`` times each way in turn; what is compared is the least wall
time of its rounds, training and scoring, and of the whole process from its start to its end, the
imports and the loading of the backbone included. The adapters must be the same to the byte.

``--schedule`` needs no idle cores: two ranks whose clients sleep for as long as their rows say, of
a cohort with one client as long as all others together, handed out longest first, in the order of
their ids, and in waves of one client a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.measure import show

if TYPE_CHECKING:
    from pfl_lm.federation.messages import Assignment, Update

N_RANKS = 2
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(N_RANKS))
THIS = "tests.benchmarks.ranks"
SLEEPS = {"a": 0.2, "b": 0.3, "c": 0.1, "d": 0.4, "e": 0.3, "f": 0.2, "g": 1.5}
"""Seconds of each client's turn; the longest is last by its id."""


def run_here(recipe: Path) -> None:
    """Run a recipe in this process, one of however many, and print how long its rounds took."""
    from pfl_lm.federation.watch import RoundReport, Watch, Workload
    from pfl_lm.finetune import finetune
    from pfl_lm.recipe import load_recipe

    class Clock(Watch):
        began = ended = 0.0

        def begin(self, workload: Workload) -> None:
            self.began = time.perf_counter()

        def round(self, report: RoundReport) -> None:
            self.ended = time.perf_counter()

    clock = Clock()
    finetune(load_recipe(recipe), clock)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"rounds": clock.ended - clock.began}))


def timed(*before: str, recipe: Path) -> dict[str, float]:
    """Start a run and return the seconds of its rounds and of all of it."""
    alone = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, *before, "-m", THIS, "--of", str(recipe)]
    began = time.perf_counter()
    ended = subprocess.run(
        command, env=os.environ | alone, capture_output=True, text=True, check=False
    )
    everything = time.perf_counter() - began
    if ended.returncode:
        raise SystemExit(ended.stderr)
    told = next(line for line in ended.stdout.splitlines() if line.startswith('{"rounds"'))
    return {**json.loads(told), "everything": everything}


def speed(folder: Path, *, tiny: bool, repeats: int) -> None:
    """Run both ways in turn, and show how many times as fast two ranks are."""
    ways = {"one process": (), f"{N_RANKS} ranks": TORCHRUN}
    seconds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for repeat in range(repeats):
        bytes_of = {}
        for way, before in ways.items():
            place = folder / f"{way}-{repeat}".replace(" ", "-")
            seconds[way].append(timed(*before, recipe=written(place, tiny=tiny)))
            found = sorted((place / "runs").glob("*/adapters/*/adapter_model.safetensors"))
            bytes_of[way] = [path.read_bytes() for path in found]
        one, two = bytes_of.values()
        assert one and one == two, "the adapters differ"  # noqa: PT018
    least = {
        way: {what: min(each[what] for each in found) for what in ("rounds", "everything")}
        for way, found in seconds.items()
    }
    one, two = least.values()
    ratios = {what: one[what] / two[what] for what in one}
    rows: list[list[object]] = [["seconds", "rounds", "everything"]]
    rows += [[way, *found.values()] for way, found in least.items()]
    rows.append(["times as fast", *ratios.values()])
    show("two ranks that take clients of their own", rows, {"all": seconds, "times": ratios})


def written(place: Path, *, tiny: bool) -> Path:
    """Write a recipe of six clients, and return its path."""
    import yaml

    from tests.benchmarks.world import QUICKSTART
    from tests.tiny import client_rows, tiny_recipe, write_jsonl

    place.mkdir(parents=True)
    if tiny:
        rows = client_rows((f"client-{i}" for i in range(6)), n_rows=8)
        data = str(write_jsonl(place / "rows.jsonl", rows))
        more = {"training.max_steps": 20, "federation.rounds": 3}
        return tiny_recipe(place, **{"data.path": data, **more})
    recipe = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    recipe["data"]["path"] = str(QUICKSTART.parent / recipe["data"]["path"])
    recipe["runtime"] = {"output_dir": str(place / "runs"), "threads": 1}
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


# --- who is given what, and when ------------------------------------------------------------------


def sleep_here() -> None:
    """On each of two ranks: let clients sleep that are handed out in several ways."""
    from types import SimpleNamespace

    import torch
    from accelerate import Accelerator

    from pfl_lm.federation.fleet import ranks
    from pfl_lm.federation.fleet.links import links
    from pfl_lm.federation.messages import Update
    from pfl_lm.federation.watch import Watch

    def sleep(task: Assignment) -> Update:
        time.sleep(SLEEPS[task.client])
        return Update(run="", round=1, client=task.client)

    def work(side: Any, kind: Any, client: str) -> float:
        return SLEEPS[client]

    accelerator = Accelerator()
    start = torch.zeros(8)
    side: Any = SimpleNamespace(training=0, start=start, watch=Watch(), carry_out=sleep)
    if links().rank:
        ranks.serve(lambda training: side)
        return
    ranks.expected_work = work
    fleet = ranks.RankFleet(side, links())
    longest = sorted(SLEEPS, key=lambda client: -SLEEPS[client])
    with ranks.leading(accelerator):
        found = {
            "longest first": clocked(lambda: list(fleet.run(tasks(longest)))),
            "by id": clocked(lambda: list(fleet.run(tasks(SLEEPS)))),
            "in waves": clocked(lambda: in_waves(fleet, tasks(SLEEPS))),
        }
    print(json.dumps({"seconds": found}))


def tasks(clients: Iterable[str]) -> Iterator[Assignment]:
    import torch

    from pfl_lm.federation.messages import Assignment
    from pfl_lm.methods import Broadcast

    for client in clients:
        sent = Broadcast({"global_weights": torch.zeros(8)})
        yield Assignment("", 1, client, "train", sent, None, 1, 0)


def in_waves(fleet: Any, coming: Iterator[Assignment]) -> list[Update]:
    """Take one task a rank, and wait for all of them before the next."""
    done: list[Update] = []
    while wave := list(islice(coming, N_RANKS)):
        done += fleet.run(wave)
    return done


def clocked(what: Any) -> float:
    began = time.perf_counter()
    assert len(what()) == len(SLEEPS)
    return time.perf_counter() - began


def schedule() -> None:
    """Start two ranks that sleep, and show what each way of handing out takes."""
    alone = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TORCHRUN, "-m", THIS, "--sleep"]
    ended = subprocess.run(
        command, env=os.environ | alone, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise SystemExit(ended.stderr)
    told = next(line for line in ended.stdout.splitlines() if line.startswith('{"seconds"'))
    found = json.loads(told)["seconds"]
    rows: list[list[object]] = [["", "seconds", "of the least possible"]]
    least = max(sum(SLEEPS.values()) / N_RANKS, *SLEEPS.values())
    rows += [[way, seconds, seconds / least] for way, seconds in found.items()]
    show("one client as long as half of the round, two ranks", rows, {"seconds": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="the tests' two-layer backbone")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--schedule", action="store_true", help="two ranks whose clients sleep")
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sleep", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.of is not None:
        run_here(given.of)
    elif given.sleep:
        sleep_here()
    elif given.schedule:
        schedule()
    else:
        with tempfile.TemporaryDirectory() as folder:
            speed(Path(folder), tiny=given.tiny, repeats=given.repeats)


if __name__ == "__main__":
    main()

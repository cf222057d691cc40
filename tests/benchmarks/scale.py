"""What ten thousand clients cost beside their training, part by part, and in memory.

    python -m tests.benchmarks.scale [--tiny]

``run`` is a federation on the tests' tiny backbone, four rows and one step a client: three
rounds of a fiftieth of the clients and one of all. It is interrupted in the middle of the last,
resumed, finished, and asked all that a ledger can be asked. ``--tiny`` takes 500 clients.

``aggregate`` is one aggregation of uploads of 1 MB that lie on disk, by each rule, of few and of
many; each in a process of its own, whose peak must not grow with their number.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.measure import Times, arguments, now, show

if TYPE_CHECKING:
    from pfl_lm.federation.messages import Update
    from pfl_lm.federation.watch import RoundReport

CLIENTS, FEW = 10_000, 500
ROUNDS = 4
"""The last one is everybody's."""

RULES = ("mean", "clipped_mean", "median", "trimmed_mean")
UPLOADS = (100, 1_000, 10_000)
NUMBERS = 250_000
"""In an upload: 1 MB."""


class StoppedError(Exception):
    """Stands for the end of a process in the middle of a round."""


def apart(what: str) -> Any:
    """Return what an expression of this module comes to in a process of its own."""
    code = (
        f"import json; from tests.benchmarks import scale\nprint('\\n' + json.dumps(scale.{what}))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


# --- a run ----------------------------------------------------------------------------------------


def places() -> dict[str, tuple[Any, str]]:
    """Return the parts of a run that are measured: where each function is found, and its name."""
    from pfl_lm import finetune
    from pfl_lm.data.federated import FederatedDataset
    from pfl_lm.export import adapters
    from pfl_lm.federation.client import ClientSide
    from pfl_lm.federation.ledger import Ledger
    from pfl_lm.federation.rounds import Orchestrator
    from pfl_lm.federation.store import Store
    from pfl_lm.methods import FedAvg

    return {
        "rows read, checked and split": (finetune, "preflight"),
        "the same, against the ledger": (finetune, "preflight_resume"),
        "rows tokenized": (FederatedDataset, "build"),
        "folder names": (finetune, "slugs"),
        "the run's first commit": (Ledger, "open_run"),
        "work counted": (finetune, "workload"),
        "a cohort drawn and committed": (Orchestrator, "_draw"),
        "a task made": (Orchestrator, "_task"),
        "a turn on the client": (ClientSide, "_train"),
        "a turn's upload and commit": (Orchestrator, "_settle"),
        "an aggregate": (FedAvg, "aggregate"),
        "a round's commit, old files gone": (Orchestrator, "_commit"),
        "a client scored": (ClientSide, "_evaluate"),
        "a client's final scoring": (ClientSide, "_finish"),
        "a client's scores committed": (Ledger, "commit_scores"),
        "a round reported": (Orchestrator, "_report"),
        "files checked on resume": (Store, "check"),
        "leftovers swept on resume": (Store, "sweep"),
        "an adapter exported": (adapters, "export_adapter"),
        "a card written": (adapters, "client_card"),
        "all exported": (finetune, "export_adapters"),
        "metrics.csv": (finetune, "write_metrics"),
    }


@contextmanager
def timed(parts: Mapping[str, tuple[Any, str]]) -> Iterator[dict[str, Times]]:
    """Note what every call of some functions takes; what they call is counted in."""
    times = {part: Times() for part in parts}
    kept = {part: vars(owner)[name] for part, (owner, name) in parts.items()}
    for part, (owner, name) in parts.items():
        whole = isinstance(kept[part], classmethod)
        noted = _noting(getattr(owner, name) if whole else kept[part], times[part])
        setattr(owner, name, staticmethod(noted) if whole else noted)
    try:
        yield times
    finally:
        for part, (owner, name) in parts.items():
            setattr(owner, name, kept[part])


def _noting(function: Callable[..., Any], times: Times) -> Callable[..., Any]:
    def noted(*given: Any, **named: Any) -> Any:
        began = now()
        try:
            return function(*given, **named)
        finally:
            times.add(*(a - b for a, b in zip(now(), began, strict=True)))

    return noted


def run_here(n_clients: int, folder: Path) -> dict[str, Any]:
    """Run, stop, resume and question a federation in this process; return what was seen.

    That is: milliseconds by part, by question and by verb, resident MB at every turn and report,
    bytes and files on disk.
    """
    import psutil

    from pfl_lm.federation.watch import Watch
    from pfl_lm.finetune import finetune
    from pfl_lm.resume import run_recipe
    from tests.benchmarks.world import recipe

    process, turns, reports = psutil.Process(), list[float](), dict[str, float]()
    began = time.perf_counter()

    def resident() -> float:
        return float(process.memory_info().rss / 2**20)

    class Looking(Watch):
        stop_at: int | None = None

        def turn(self, update: Update) -> None:
            turns.append(resident())
            if len(turns) == self.stop_at:
                raise StoppedError

        def round(self, report: RoundReport) -> None:
            reports[f"after round {report.round}"] = resident()
            said = f"round {report.round}: {time.perf_counter() - began:.0f} s"
            print(said, file=sys.stderr, flush=True)

    few = max(1, n_clients // 50)
    changes: dict[str, Any] = {"method": {"name": "fedavg"}, "federation.rounds": ROUNDS}
    changes |= {"federation.availability": str(trace(folder / "trace.csv", n_clients, few))}
    looking = Looking()
    looking.stop_at = (ROUNDS - 1) * few + n_clients // 2
    with timed(places()) as times:
        try:
            finetune(recipe(folder, tiny=True, n_clients=n_clients, **changes), looking)
        except StoppedError:
            [run] = (folder / "runs").iterdir()
        reports["stopped and resumed"] = resident()
        looking.stop_at = None
        result = finetune(run_recipe(run), looking, resume=True)
    reports["at the end"] = resident()
    disk, files = usage(run)
    return {
        "parts": {part: summary(each) for part, each in times.items() if each.wall},
        "questions": questions(run),
        "verbs": verbs(run, result.clients),
        "turns": turns,
        "resident": reports,
        "disk": disk,
        "files": files,
        "seconds": time.perf_counter() - began,
    }


def trace(path: Path, n_clients: int, few: int) -> Path:
    """Write who can be reached: some in every round but the last, and all in that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        f"{round},client-{i:02d}"
        for round in range(1, ROUNDS + 1)
        for i in range(n_clients)
        if round == ROUNDS or i % (n_clients // few) == round
    ]
    path.write_text("\n".join(["round,client", *rows, ""]))
    return path


def summary(times: Times) -> dict[str, float]:
    """Return calls, all milliseconds, and the medians of the first and the last tenth of them."""
    tenth = max(1, len(times.cpu) // 10)
    return {
        "calls": len(times.cpu),
        "cpu": sum(times.cpu),
        "wall": sum(times.wall),
        "first": statistics.median(times.cpu[:tenth]),
        "last": statistics.median(times.cpu[-tenth:]),
    }


def questions(run: Path) -> dict[str, float]:
    """Return the milliseconds that each question to the ledger takes, the least of three."""
    from pfl_lm.resume import glance

    with glance(run) as history:
        assert history is not None
        round, client = history.last_round(), history.members()[0].client
        assert round is not None
        asked: dict[str, Callable[[], object]] = {
            **{name: partial(_whole, getattr(history, name)) for name in _OF_THE_RUN},
            **{name: partial(getattr(history, name), round) for name in _OF_A_ROUND},
            "validation": partial(history.validation, round, "global"),
            "validation_means": partial(history.validation_means, "global"),
            "state_file": partial(history.state_file, client),
            "last_fault": partial(history.last_fault, round, client),
        }
        found = {name: least(question) for name, question in asked.items()}

    def opened() -> None:
        with glance(run):
            pass

    return {"opened and checked": least(opened), **found}


def _whole(question: Callable[[], object]) -> None:
    """Ask, and go through an answer that comes row by row."""
    answer = question()
    if isinstance(answer, Iterator):
        for _ in answer:
            pass


_OF_THE_RUN = (
    *("about", "members", "removed", "last_round", "last_begun", "scores", "final_scores"),
    *("costs", "choices", "traffic", "live_files", "turn_summaries"),
)
_OF_A_ROUND = (
    *("newcomers", "server_file", "cohort", "waiting", "faults", "turns", "scored", "chosen"),
    "superseded",
)


def least(do: Callable[[], object]) -> float:
    """Return milliseconds of processor time, the least of three."""
    times = []
    for _ in range(3):
        began = time.process_time()
        do()
        times.append(1e3 * (time.process_time() - began))
    return min(times)


def verbs(run: Path, results: Sequence[Any]) -> dict[str, float]:
    """Return the milliseconds of what ends a run and of what is done with it, and lines printed."""
    from rich.console import Console

    from pfl_lm.cli.push import _show_plan
    from pfl_lm.export.index import read_index
    from pfl_lm.export.plan import plan_push
    from pfl_lm.finetune import preflight_resume
    from pfl_lm.report.table import client_table, summary_lines
    from pfl_lm.resume import run_recipe

    with tempfile.TemporaryFile("w+") as screen:
        console = Console(file=screen, width=120)

        def closing() -> None:
            screen.seek(0)
            screen.truncate()
            console.print(client_table(results))
            for line in summary_lines(results, run):
                console.print(line)

        table = least(closing)
        screen.seek(0)
        lines = len(screen.readlines())
    began = time.process_time()
    plan = plan_push(run, "org/name", remote=None)
    planned = 1e3 * (time.process_time() - began)
    listing = capture(partial(_show_plan, plan, "org/name"))
    return {
        "closing table": table,
        "closing table, lines": lines,
        "adapters.json read": least(partial(read_index, run)),
        "adapters.json, MB": (run / "adapters.json").stat().st_size / 1e6,
        "push --dry-run, planned": planned,
        "push --dry-run, lines": len(listing.splitlines()),
        "resume: recipe read": least(partial(run_recipe, run)),
        "resume: rows compared": least(partial(preflight_resume, run_recipe(run))),
    }


def capture(do: Callable[[], object]) -> str:
    """Return what is printed."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as said:
        do()
    return said.getvalue()


def usage(folder: Path) -> tuple[dict[str, int], int]:
    """Return the bytes that each part of a run folder takes on disk, and the files and folders."""
    disk: dict[str, int] = {}
    count = 0
    for path in folder.rglob("*"):
        count += 1
        part = path.relative_to(folder).parts[0]
        disk[part] = disk.get(part, 0) + 512 * path.lstat().st_blocks
    return disk, count


def run_apart(n_clients: int, folder: Path) -> dict[str, Any]:
    """Do what `run_here` does in a process of its own."""
    found: dict[str, Any] = apart(f"run_here({n_clients}, scale.Path({str(folder)!r}))")
    return found


# --- an aggregation -------------------------------------------------------------------------------


def aggregate_here(rule: str, n: int, folder: Path) -> dict[str, float]:
    """Average uploads of 1 MB by a rule; return seconds, MB read, and MB the peak has grown by.

    Sixteen files stand for ``n``: each is read as often as it is named.
    """
    import torch

    from pfl_lm.federation.store import Store, StoredUploads
    from pfl_lm.layout import AdapterLayout
    from pfl_lm.methods import Setup, Upload
    from pfl_lm.methods.combine import combine
    from pfl_lm.recipe import AggregationOptions
    from tests.benchmarks.memory import peak
    from tests.world import options

    store = Store(folder, {f"c-{i}": f"c-{i}" for i in range(16)}, torch.device("cpu"))
    files = [
        store.save_upload(client, 1, Upload({"weights": torch.randn(NUMBERS)}, 1.0))
        for client in store.slugs
    ]
    uploads = StoredUploads(store, [("", files[i % 16]) for i in range(n)])
    how = {"rule": rule, **({"clip_norm": 1.0} if rule == "clipped_mean" else {})}
    setup = Setup(AdapterLayout(()), n, 0, options(), AggregationOptions.model_validate(how))
    combine(setup, 1, torch.zeros(NUMBERS), uploads[:2], "weights")
    before, read, (wall, cpu) = peak(), megabytes_read(), now()
    combine(setup, 1, torch.zeros(NUMBERS), uploads, "weights")
    after = now()
    seconds = {"wall": after[0] - wall, "cpu": after[1] - cpu}
    return {**seconds, "read": megabytes_read() - read, "grown": peak() - before}


def megabytes_read() -> float:
    """Return what this process has read by now, from disks and from the system's cache."""
    return int(Path("/proc/self/io").read_text().split()[1]) / 1e6


def aggregate_apart(rule: str, n: int) -> dict[str, float]:
    """Do what `aggregate_here` does in a process of its own."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        found: dict[str, float] = apart(f"aggregate_here({rule!r}, {n}, scale.Path({folder!r}))")
    return found


def main() -> None:
    given = arguments(__doc__, repeats=1)
    n_clients = FEW if given.tiny else CLIENTS
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        found = run_apart(n_clients, Path(folder))
    turns = found.pop("turns")
    at = {f"after turn {i}": turns[i - 1] for i in (1, len(turns) // 20, len(turns) // 2)}
    memory = {**at, "after the last turn": turns[-1], **found["resident"]}
    show(f"{n_clients} clients: resident MB", [["", "MB"], *memory.items()], {"megabytes": memory})
    heads = ["", "calls", "cpu s", "wall s", "cpu ms, first tenth", "last tenth"]
    rows: list[list[object]] = [heads]
    for part, each in found["parts"].items():
        seconds = [each["cpu"] / 1e3, each["wall"] / 1e3]
        rows.append([part, each["calls"], *seconds, each["first"], each["last"]])
    show("parts of the run", rows, {"parts": found["parts"], "seconds": found["seconds"]})
    for what in ("questions", "verbs"):
        show(what, [["", "cpu ms"], *found[what].items()], {what: found[what]})
    show("disk", [["", "bytes"], *found["disk"].items()], {"files": found["files"]})

    rows = [["uploads of 1 MB", "number", "cpu s", "wall s", "MB read", "peak grown by, MB"]]
    for rule in RULES:
        for n in UPLOADS[: 1 if given.tiny else 3]:
            each = aggregate_apart(rule, n)
            rows.append([rule, n, *(each[what] for what in ("cpu", "wall", "read", "grown"))])
    show("aggregation", rows, {"rows": rows[1:]})


if __name__ == "__main__":
    main()

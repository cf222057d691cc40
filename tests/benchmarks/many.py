"""What a thousand clients cost beside their training: memory, and the bookkeeping of a turn.

    python -m tests.benchmarks.many [--tiny] [--repeats N]

``run`` is one round of 1,000 clients on the tests' tiny backbone, four rows and one optimizer step
each, their states 64 kB: at every turn the process's resident memory, and what passes between two
turns less the method's own turn (``Method.turn``: the fit, its Trainer, its batches).

``sizes`` lets the same orchestrator, store and ledger keep books on turns that take no time, with
states of 64 kB, 1 MB and 10 MB and uploads as large: a state is read and checked, a state and an
upload are written and synced, the upload is looked at, and a row is committed. ``--repeats`` is the
number of turns of each size; ``--tiny`` leaves the largest out and takes 100 clients in ``run``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.measure import Times, arguments, now, show, table

if TYPE_CHECKING:
    from pfl_lm.federation.messages import Assignment, Update

CLIENTS = 1000
FEW = 100
"""The client from which on memory is compared."""

SIZES = {"64 kB": 16_000, "1 MB": 250_000, "10 MB": 2_500_000}
"""Numbers in a vector, four bytes each."""


# --- a run of many clients ------------------------------------------------------------------------


def run_here(n_clients: int, folder: Path) -> dict[str, Any]:
    """Run one round of so many clients in this process; return what was seen at every turn.

    That is: resident memory in MB, and milliseconds of bookkeeping by wall and cpu.
    """
    import psutil

    from pfl_lm.federation.watch import Watch
    from pfl_lm.finetune import finetune
    from pfl_lm.methods import FedAvg
    from tests.benchmarks.world import recipe

    process, resident, books = psutil.Process(), list[float](), Times()
    training, mark = [0.0, 0.0], list[float]()
    turn = FedAvg.turn

    def timed(*given: Any) -> Any:
        began = now()
        made = turn(*given)
        training[:] = [a + b - c for a, b, c in zip(training, now(), began, strict=True)]
        return made

    class AtEveryTurn(Watch):
        def turn(self, update: Update) -> None:
            resident.append(process.memory_info().rss / 2**20)
            if mark:
                books.add(*(a - b - c for a, b, c in zip(now(), mark, training, strict=True)))
            training[:] = [0.0, 0.0]
            mark[:] = now()

    FedAvg.turn = timed  # type: ignore[method-assign]
    changes = {"federation.rounds": 1, "method": {"name": "fedavg"}, "adapter.r": 36}
    try:
        finetune(recipe(folder, tiny=True, n_clients=n_clients, **changes), AtEveryTurn())
    finally:
        FedAvg.turn = turn  # type: ignore[method-assign]
    end = process.memory_info().rss / 2**20
    state = next((folder / "runs").glob("*/clients/*/state-1.safetensors")).stat().st_size
    return {"resident": [*resident, end], "wall": books.wall, "cpu": books.cpu, "state": state}


def run_apart(n_clients: int) -> dict[str, Any]:
    """Do the same in a process of its own."""
    code = (
        "import json, tempfile; from pathlib import Path\n"
        "from tests.benchmarks.many import run_here\n"
        "with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:\n"
        f"    print('\\n' + json.dumps(run_here({n_clients}, Path(folder))))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- bookkeeping alone ----------------------------------------------------------------------------


def books_on(numbers: int, n_turns: int, folder: Path) -> Times:
    """Keep books on turns that take no time, all but the first of ``n_turns`` clients' second."""
    import torch

    from pfl_lm.federation.cohort import Cohorts
    from pfl_lm.federation.faults import refuse_not_finite
    from pfl_lm.federation.history import Member
    from pfl_lm.federation.ledger import Ledger
    from pfl_lm.federation.messages import Choice, Score, Update
    from pfl_lm.federation.rounds import Orchestrator
    from pfl_lm.federation.store import Store
    from pfl_lm.federation.watch import Watch
    from pfl_lm.layout import AdapterLayout
    from pfl_lm.methods import METHODS, ClientState, Setup, Upload
    from tests.benchmarks.world import recipe

    loaded = recipe(folder, tiny=True, **{"method": {"name": "fedavg"}, "federation.rounds": 2})
    names = [f"client-{i:04d}" for i in range(n_turns)]
    store = Store(folder, {name: name for name in names}, torch.device("cpu"))
    start, times = torch.randn(numbers), Times()

    class Books(Watch):
        mark: tuple[float, float] | None = None

        def turn(self, update: Update) -> None:
            if self.mark is not None and update.round > 1:
                times.add(*(a - b for a, b in zip(now(), self.mark, strict=True)))
            self.mark = now()

    class Echo:
        """What a client does around its training, without it."""

        def run(self, tasks: Iterable[Assignment]) -> Iterator[Update]:
            for task in tasks:
                about: Any = {"run": task.run, "round": task.round, "client": task.client}
                if task.kind != "train":
                    score = Score("validation", "global", 1.0, 1, 1)
                    choice = Choice("global", "", 0.0, 0.0) if task.kind == "finish" else None
                    yield Update(**about, scores=(score,), choice=choice)
                    continue
                state = ClientState({"weights": start})
                if task.state is not None:
                    state = store.load_client(task.state)
                upload = Upload(dict(state.vectors), 1.0)
                refuse_not_finite("state", state.vectors)
                refuse_not_finite("upload", upload.vectors)
                file = store.save_client(task.client, task.round, state)
                yield Update(**about, state=file, upload=upload)

    setup = Setup(AdapterLayout(()), n_turns, 0, loaded.recipe.training)
    method = METHODS["fedavg"](loaded.recipe.method, setup)
    with closing(Ledger(folder / "federation.sqlite")) as ledger:
        ledger.open_run({}, [Member(name, name, 1, 1, 1) for name in names])
        steps: Mapping[str, int] = dict.fromkeys(names, 1)
        cohorts = Cohorts.of(loaded.recipe, steps)
        federation = Orchestrator(
            loaded.recipe, steps, cohorts, method, Echo(), store, ledger, Books()
        )
        federation.run(method.init_server(start))
    return times


def main() -> None:
    given = arguments(__doc__, repeats=50)
    n_clients = FEW if given.tiny else CLIENTS
    found = run_apart(n_clients)
    resident, tenth = found["resident"], max(1, n_clients // 10)
    at = {"1": 0, str(FEW): FEW - 1, str(n_clients): n_clients - 1, "the end": n_clients}
    rows: list[list[object]] = [["MB", "resident"]]
    rows += [[f"after the turn of client {i}", resident[k]] for i, k in at.items()]
    show("memory", rows, {"megabytes": {i: resident[k] for i, k in at.items()}})

    parts = {"first": slice(tenth), "last": slice(-tenth, None), "all": slice(None)}
    books = {
        f"between turns, {name}": Times(found["wall"][part], found["cpu"][part])
        for name, part in parts.items()
    }
    numbers = {name: each.numbers for name, each in books.items()}
    title = f"bookkeeping of {n_clients} turns, a state of {found['state'] / 1e3:.0f} kB"
    show(title, table(books), {"ms": numbers})

    sizes = dict(list(SIZES.items())[: 2 if given.tiny else 3])
    times = {}
    for name, size in sizes.items():
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            times[f"state of {name}"] = books_on(size, given.repeats, Path(folder))
    (low, *_, high), (small, *_, large) = times.values(), sizes.values()
    per_megabyte = {
        which: (statistics.median(getattr(high, which)) - statistics.median(getattr(low, which)))
        / ((large - small) * 4 / 1e6)
        for which in ("wall", "cpu")
    }
    numbers = {name: each.numbers for name, each in times.items()}
    show("bookkeeping alone", table(times), {"ms": numbers, "ms_per_megabyte": per_megabyte})
    said = ", ".join(f"{which} {value:.1f} ms" for which, value in per_megabyte.items())
    print(f"  each further MB of state and of upload: {said}\n")


if __name__ == "__main__":
    main()

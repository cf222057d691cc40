"""The bookkeeping of a turn beside its training, with states and uploads of several sizes.

    python -m tests.benchmarks.books [--tiny] [--repeats N]

Orchestrator, store and ledger keep books on turns that take no time, with states of 64 kB, 1 MB and
10 MB and uploads as large: a state is read and checked, a state and an upload are written and
synced, the upload is looked at, and a row is committed. ``--repeats`` is the number of turns of
each size; ``--tiny`` leaves the largest out.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.measure import Times, arguments, now, show, table

if TYPE_CHECKING:
    from pfl_lm.federation.ledger import Ledger
    from pfl_lm.federation.messages import Assignment, Kind, Update
    from pfl_lm.federation.rounds import Orchestrator
    from pfl_lm.federation.store import Store
    from pfl_lm.federation.watch import Watch
    from pfl_lm.layout import Vector

SIZES = {"64 kB": 16_000, "1 MB": 250_000, "10 MB": 2_500_000}
"""Numbers in a vector, four bytes each."""


class Echo:
    """What a client does around its training, without it: a fleet whose clients send their state.

    A client's state begins at ``start``.
    """

    def __init__(self, store: Store, start: Vector) -> None:
        self.store = store
        self.start = start

    def order(self, kind: Kind, clients: Sequence[str]) -> list[str]:
        return list(clients)

    def run(self, tasks: Iterable[Assignment]) -> Generator[Update]:
        for task in tasks:
            yield self._carry_out(task)

    def _carry_out(self, task: Assignment) -> Update:
        from pfl_lm.federation.faults import refuse_not_finite
        from pfl_lm.federation.messages import Choice, Score, Update
        from pfl_lm.methods import ClientState, Upload

        about: Any = {"run": task.run, "round": task.round, "client": task.client}
        if task.kind != "train":
            score = Score("validation", "global", 1.0, 1, 1)
            choice = Choice("global", "", 0.0, 0.0) if task.kind == "finish" else None
            return Update(**about, scores=(score,), choice=choice)
        state = ClientState({"weights": self.start})
        if task.state is not None:
            state = self.store.load_client(task.state)
        upload = Upload(dict(state.vectors), 1.0)
        refuse_not_finite("state", state.vectors)
        refuse_not_finite("upload", upload.vectors)
        file = self.store.save_client(task.client, task.round, state)
        return Update(**about, state=file, upload=upload)


def begin(
    folder: Path, ledger: Ledger, n_clients: int, start: Vector, watch: Watch, **changes: Any
) -> Orchestrator:
    """Begin a run of `fedavg` with clients that do not train; ``changes`` of its recipe."""
    import torch

    from pfl_lm.federation.cohort import Cohorts
    from pfl_lm.federation.history import Member
    from pfl_lm.federation.rounds import Orchestrator
    from pfl_lm.federation.store import Store
    from pfl_lm.layout import AdapterLayout
    from pfl_lm.methods import METHODS, Setup
    from tests.benchmarks.world import recipe

    loaded = recipe(folder, tiny=True, **{"method": {"name": "fedavg"}, **changes})
    names = [f"client-{i:04d}" for i in range(n_clients)]
    store = Store(folder, {name: name for name in names}, torch.device("cpu"))
    setup = Setup(AdapterLayout(()), n_clients, 0, loaded.recipe.training)
    method = METHODS["fedavg"](loaded.recipe.method, setup)
    ledger.open_run({}, [Member(name, name, 1, 1, 1) for name in names])
    steps: Mapping[str, int] = dict.fromkeys(names, 1)
    cohorts = Cohorts.of(loaded.recipe, steps)
    fleet = Echo(store, start)
    return Orchestrator(loaded.recipe, steps, cohorts, method, fleet, store, ledger, watch)


def books_on(numbers: int, n_turns: int, folder: Path) -> Times:
    """Keep books on turns that take no time, all but the first of ``n_turns`` clients' second."""
    import torch

    from pfl_lm.federation.ledger import Ledger
    from pfl_lm.federation.watch import Watch

    start, times = torch.randn(numbers), Times()

    class Books(Watch):
        mark: tuple[float, float] | None = None

        def turn(self, update: Update) -> None:
            if self.mark is not None and update.round > 1:
                times.add(*(a - b for a, b in zip(now(), self.mark, strict=True)))
            self.mark = now()

    with closing(Ledger(folder / "federation.sqlite")) as ledger:
        run = begin(folder, ledger, n_turns, start, Books(), **{"federation.rounds": 2})
        run.run(run.method.init_server(start))
    return times


def main() -> None:
    given = arguments(__doc__, repeats=50)
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

"""What a client's turn costs: against a bare PyTorch loop, and beside its optimizer steps.

    python -m tests.benchmarks.turn [--tiny] [--repeats N]

``steps`` sets a fit of ``LocalTrainer.train`` against a loop with the same model, loss, batches and
optimizer; both end at the same bits. Beside them stands a whole turn of pFLAlign on the same
batches: what its two callbacks cost. ``fixed`` runs a whole federation and takes, between two
clients' turns of one round, everything that is not an optimizer step: reading the client's state,
swapping its numbers in, building the Trainer, setting the fit up, writing state and upload, and
the ledger's commit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from pfl_lm.data.batches import training_batches
from pfl_lm.data.federated import FederatedDataset
from pfl_lm.federation.messages import Update
from pfl_lm.federation.watch import RoundReport, Watch
from pfl_lm.finetune import finetune
from pfl_lm.methods import METHODS, ClientInfo, Setup
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import load_backbone
from pfl_lm.preflight import preflight
from pfl_lm.train import LocalTrainer
from pfl_lm.train.loss import nll_sum
from tests.benchmarks.measure import Times, alternate, arguments, now, show, table
from tests.benchmarks.world import recipe

STEPS = {"training.max_steps": 4, "training.per_device_train_batch_size": 4}


def against_a_loop(folder: Path, *, tiny: bool, repeats: int) -> None:
    """Take a fit and a bare loop in turn, and show both with their ratio."""
    loaded = recipe(folder, tiny=tiny, n_clients=1, n_rows=24, **STEPS)
    options = loaded.recipe
    torch.set_num_threads(1)
    backbone = load_backbone(options.backbone, torch.device("cpu"))
    adapter = Adapter(backbone, options.adapter, seed=0)
    rows = FederatedDataset.build(preflight(loaded), backbone.tokenizer, options.data.max_length)
    examples, start = rows.train("client-00"), adapter.read()
    batching = {
        "steps": 4,
        "accumulation": 1,
        "batch_size": 4,
        "pad_token_id": backbone.pad_token_id,
        "seed": 1,
    }
    run = LocalTrainer(
        adapter,
        examples,
        options.training,
        steps=4,
        pad_token_id=backbone.pad_token_id,
        seed=1,
    )
    ends: dict[str, Tensor] = {}

    def loop() -> None:
        adapter.write(start)
        adapter.train_only(None)
        adapter.model.train()
        rate = options.training.learning_rate
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate, weight_decay=0.0)
        for batch in training_batches(examples, **batching):
            nll = nll_sum(adapter.model, batch)
            optimizer.zero_grad(set_to_none=False)
            (nll / batch["window_tokens"]).backward()
            optimizer.step()
        adapter.model.eval()
        ends["loop"] = adapter.read()

    def fit() -> None:
        ends["fit"] = run.train(start, steps=4)

    setup = Setup(adapter.layout, 1, 0, options.training)
    method = METHODS["pflalign"](options.method, setup)
    sent = method.broadcast(method.init_server(start), "client-00")
    client = method.init_client(ClientInfo("client-00", len(examples), adapter.layout), start)

    def aligned() -> None:
        method.turn(sent, client, run)

    work = {"LocalTrainer.train": fit, "bare loop": loop, "pflalign's turn": aligned}
    times = alternate(work, repeats)
    same = torch.equal(ends["fit"], ends["loop"])
    ratio = {
        name: times[name].numbers["cpu_median"] / times["bare loop"].numbers["cpu_median"]
        for name in ("LocalTrainer.train", "pflalign's turn")
    }
    title = f"a turn of 4 steps of 4 rows, {backbone.dtype}; ends at the same bits: {same}"
    numbers = {name: each.numbers for name, each in times.items()}
    show(title, table(times), {"ratio": ratio, "same": same, "ms": numbers})
    said = ", ".join(f"{name} {value:.3f}" for name, value in ratio.items())
    print(f"  against the bare loop, by cpu medians: {said}\n")


class Stopwatch(L.Callback):
    """Adds up what passes between the start and the end of every step."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self._began = (0.0, 0.0)

    def on_train_batch_start(self, *args: Any) -> None:
        self._began = now()

    def on_train_batch_end(self, *args: Any) -> None:
        wall, cpu = now()
        self.wall += wall - self._began[0]
        self.cpu += cpu - self._began[1]


class BetweenTurns(Watch):
    """Takes the time from one client's turn to the next, less that of the steps."""

    def __init__(self) -> None:
        self.steps = Stopwatch()
        self.fixed = Times()
        self._mark: tuple[float, float] | None = None

    def turn(self, update: Update) -> None:
        wall, cpu = now()
        if self._mark is not None and update.round > 1:  # the first round warms up
            spent = wall - self._mark[0] - self.steps.wall, cpu - self._mark[1] - self.steps.cpu
            self.fixed.add(*spent)
        self.steps.wall = self.steps.cpu = 0.0
        self._mark = now()

    def round(self, report: RoundReport) -> None:
        self._mark = None


def fixed_cost(folder: Path, *, tiny: bool, repeats: int) -> None:
    """Run a federation and show what its turns cost beside their steps."""
    watch = BetweenTurns()
    loaded = recipe(folder, tiny=tiny, **{"federation.rounds": repeats})
    with watching(watch.steps):
        finetune(loaded, watch)
    name = f"a {loaded.recipe.method.name} turn less its steps"
    show("fixed cost of a turn", table({name: watch.fixed}), watch.fixed.numbers)


@contextmanager
def watching(stopwatch: Stopwatch) -> Iterator[None]:
    """Put a stopwatch into every fit while the body runs."""
    train = LocalTrainer.train

    def timed(self: LocalTrainer, start: Tensor, *, callbacks: Any = (), **more: Any) -> Tensor:
        return train(self, start, callbacks=[*callbacks, stopwatch], **more)

    LocalTrainer.train = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        LocalTrainer.train = train  # type: ignore[method-assign]


def main() -> None:
    given = arguments(__doc__, repeats=8)
    with tempfile.TemporaryDirectory() as folder:
        against_a_loop(Path(folder) / "loop", tiny=given.tiny, repeats=given.repeats)
        fixed_cost(Path(folder) / "fixed", tiny=given.tiny, repeats=given.repeats)


if __name__ == "__main__":
    main()

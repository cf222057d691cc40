"""The runs that are ended and gone on with: every method, optimizer and way of going wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pfl_lm.cli.finetune import finetune
from pfl_lm.cli.resume import resume
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.messages import Assignment, Update
from pfl_lm.membership import join
from tests.tiny import client_rows, tiny_recipe, write_jsonl


def _faulty() -> None:
    """Let some turns fail, each for a reason that any process meets again.

    Round 1: bob's raise, both of them. Round 2: carol's runs out of memory until its batches are
    halved; what alice sends is far out of proportion, twice.
    """
    train = ClientSide._train

    def spoiled(self: ClientSide, task: Assignment) -> Update:
        match task.round, task.client:
            case 1, "bob":
                raise ValueError("no data today")
            case 2, "carol" if not task.halved:
                raise MemoryError
            case 2, "alice":
                update = train(self, task)
                assert update.upload is not None
                vectors = {n: v * 1e9 for n, v in update.upload.vectors.items()}
                return replace(update, upload=replace(update.upload, vectors=vectors))
        return train(self, task)

    ClientSide._train = spoiled  # type: ignore[method-assign]


def _rate_is_too_high_at_first() -> None:
    import pfl_lm.train.rate

    pfl_lm.train.rate.TAU = 400.0


def _secret_is_known() -> None:
    """Give every process the same draw, for there is noise, and two runs are to be compared."""
    import pfl_lm.federation.noise

    pfl_lm.federation.noise.secrets.randbits = lambda bits: 2**bits // 3  # type: ignore[assignment]


def _has_come(place: Path, folder: Path) -> None:
    """Let dora join."""
    join(folder, "dora", write_jsonl(place / "dora.jsonl", client_rows(("dora",))))


@dataclass(frozen=True)
class Variant:
    """One kind of run.

    Attributes:
        changes: to the tiny recipe.
        spoil: what is done in a process before it begins.
        more: rounds that a finished run is given, after a client has joined; the process that is
            ended is the one that adds them.
        starts_over: whether it takes turns back that were committed.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    spoil: Callable[[], None] = lambda: None
    more: int | None = None
    starts_over: bool = False

    def write(self, place: Path, runs: Path | None = None) -> Path:
        """Write the recipe to a new folder ``place``, and return where its run will be."""
        place.mkdir(parents=True)
        runs = runs or place / "runs"
        tiny_recipe(place, **self.changes, **{"runtime.output_dir": str(runs)})
        return runs / "tiny"

    def prepare(self, place: Path, folder: Path) -> None:
        """Bring a run to where it is given more rounds."""
        finetune(place / "recipe.yaml", [])
        _has_come(place, folder)

    def go_on(self, place: Path, folder: Path) -> None:
        """Do what a person would type at first and after every interruption."""
        self.spoil()
        if self.more is None:
            finetune(place / "recipe.yaml", [], resume=True)
        else:
            resume(folder, self.more)


VARIANTS = {
    "pflalign, a share of the clients, dropout": Variant(
        {"federation.fraction_train": 0.7, "federation.rounds": 3, "adapter.lora_dropout": 0.2}
    ),
    "fedavg, faults": Variant(
        {"method.name": "fedavg", "federation.rounds": 3, "federation.min_clients": 2}, _faulty
    ),
    "pflalign on AdamW's direction": Variant(
        {
            "training.optimizer": "adamw",
            "method.precondition_target": "update",
            "method.update_scale": "match",
        }
    ),
    "local, AdamW": Variant({"method.name": "local", "training.optimizer": "adamw"}),
    "pflalign, a rate found by halving": Variant(
        {"training.learning_rate": "auto"}, _rate_is_too_high_at_first, starts_over=True
    ),
    "pflalign, tracked": Variant({"runtime.tracking": "tensorboard"}),
    "fedavg, AdamW, a late client and more rounds": Variant(
        {"method.name": "fedavg", "training.optimizer": "adamw", "federation.rounds": 1}, more=3
    ),
    "fedavg, noise, drawn by rows": Variant(
        {
            "method.name": "fedavg",
            "method.weighting": "uniform",
            "federation.clients_per_round": 2,
            "federation.sampling": "examples",
            "privacy.client_level": {"noise_multiplier": 1.0, "clip_norm": 1.0, "delta": 1e-3},
        },
        _secret_is_known,
    ),
}

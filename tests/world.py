"""A backbone with its adapter, clients' examples and a trainer, for tests below a whole run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pfl_lm.data.content import PromptCompletion
from pfl_lm.data.examples import Example
from pfl_lm.data.render import render
from pfl_lm.layout import Vector
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import Backbone, load_backbone
from pfl_lm.recipe import AdapterOptions, BackboneOptions, TrainingOptions
from pfl_lm.train import LocalTrainer
from tests.tiny import client_rows, tiny_model


@dataclass(frozen=True)
class World:
    """One resident backbone and adapter; ``start`` is the adapter as injected, so B = 0."""

    backbone: Backbone
    adapter: Adapter
    start: Vector

    def examples(self, client: str = "alice", n_rows: int = 8) -> tuple[Example, ...]:
        """Return a client's rows in tokens, of unequal lengths."""
        rows = client_rows((client,), n_rows=n_rows)
        endings = ("", " Then it ends.", " And so on, and on, and on, until it ends.")
        contents = [
            PromptCompletion(row["prompt"], row["completion"] + endings[i % 3])
            for i, row in enumerate(rows)
        ]
        return tuple(render(self.backbone.tokenizer, content) for content in contents)

    def vector(self, seed: int = 1, scale: float = 0.05) -> Vector:
        """Return the start plus noise, so that A and B both have an effect and gradients."""
        generator = torch.Generator().manual_seed(seed)
        return self.start + scale * torch.randn(len(self.start), generator=generator)

    def trainer(
        self,
        *,
        steps: int = 3,
        client: str = "alice",
        seed: int = 5,
        rows: tuple[Example, ...] | None = None,
        **training: Any,
    ) -> LocalTrainer:
        """Return what a method is given to train a client with: SGD at 0.5 on batches of 2."""
        return LocalTrainer(
            self.adapter,
            self.examples(client) if rows is None else rows,
            options(max_steps=steps, **training),
            steps=steps,
            pad_token_id=self.backbone.pad_token_id,
            seed=seed,
        )


def options(**training: Any) -> TrainingOptions:
    """Return training options: SGD at 0.5, 3 steps of batch 2, unless said otherwise."""
    small = {
        "learning_rate": 0.5,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "optimizer": "sgd",
    }
    return TrainingOptions.model_validate(small | training)


def make_world(dtype: str = "float32", **adapter: Any) -> World:
    """Load the tiny backbone and put a fresh adapter into it."""
    source = BackboneOptions.model_validate(
        {"model_name_or_path": str(tiny_model()), "dtype": dtype}
    )
    backbone = load_backbone(source, torch.device("cpu"))
    fresh = Adapter(backbone, AdapterOptions.model_validate(adapter), seed=11)
    return World(backbone, fresh, fresh.read())

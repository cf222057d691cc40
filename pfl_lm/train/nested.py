"""Lightning's Trainer within a run: one for each fit of a client, of which nobody needs to hear."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from typing_extensions import override

from pfl_lm.train.scaling import ScaledGradients


class Ticker(L.Callback):
    """Tells of every optimizer step."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.on_step = on_step
        self._seen = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from 0 in every fit of the turn."""
        self._seen = 0

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self.on_step()


class quiet(warnings.catch_warnings):  # noqa: N801
    """Silence what Lightning says to people who call it once; we call it for every client."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", module=r"lightning\..*")


def trainer_for(
    device: torch.device,
    accumulation: int,
    steps: int,
    callbacks: list[L.Callback],
    scaling: ScaledGradients | None,
) -> L.Trainer:
    """Return a Trainer on one device, for so many optimizer steps of ``accumulation`` batches."""
    return L.Trainer(
        strategy=SingleDeviceStrategy(device=device),
        plugins=None if scaling is None else [scaling],
        accelerator="cuda" if device.type == "cuda" else device.type,
        devices=1,
        max_epochs=1,
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )

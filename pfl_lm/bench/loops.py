"""Loops in plain PyTorch, as anyone would write them around a PEFT model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from pfl_lm.bench.case import Case, Did
from pfl_lm.bench.clock import Stopwatch
from pfl_lm.model.adapter import Adapter
from pfl_lm.train.loss import nll_sum


@contextmanager
def loop(case: Case, steps: Stopwatch, *, all_layers: bool = False) -> Iterator[Callable[[], Did]]:
    """Train with the model's own loss: logits at every position, the labels of most ignored."""
    with case.adapter(all_layers=all_layers) as adapter:

        def loss(batch: Mapping[str, Any]) -> Tensor:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
            share: float = len(batch["positions"]) / batch["window_tokens"]
            mean: Tensor = adapter.model(**inputs, use_cache=False).loss
            return mean * share

        yield _turn(case, steps, adapter, loss)


@contextmanager
def same_loop(case: Case, steps: Stopwatch) -> Iterator[Callable[[], Did]]:
    """Train with the loss and the trunk of pfl-lm: what `LocalTrainer.train` does, without it."""
    accumulation = case.recipe.training.gradient_accumulation_steps
    with case.adapter(trunk=case.trunk) as adapter:

        def loss(batch: Mapping[str, Any]) -> Tensor:
            window_tokens: int = batch["window_tokens"]
            nll = nll_sum(adapter.forward, batch)
            return nll * accumulation / window_tokens / accumulation

        yield _turn(case, steps, adapter, loss)


def _turn(
    case: Case,
    steps: Stopwatch,
    adapter: Adapter,
    loss: Callable[[Mapping[str, Any]], Tensor],
) -> Callable[[], Did]:
    start = adapter.read()
    devices = [case.device] if case.device.type == "cuda" else []

    def turn() -> Did:
        adapter.write(start)
        adapter.train_only(None)
        adapter.model.train()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(case.seed)  # of dropout
            optimizer = build_optimizer(case, adapter.parameters())
            for window in case.windows():
                steps.start()
                optimizer.zero_grad()
                for batch in window:
                    loss(batch).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                steps.stop()
        adapter.model.eval()
        return Did(adapter.read())

    return turn


def build_optimizer(case: Case, parameters: Iterator[torch.nn.Parameter]) -> Optimizer:
    """Return the recipe's optimizer at its constant rate, without weight decay."""
    training = case.recipe.training
    if training.optimizer == "sgd":
        return SGD(parameters, lr=training.learning_rate)
    return AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)

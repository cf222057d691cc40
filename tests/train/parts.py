"""Fits of the tiny backbone with pFLAlign's callbacks, and callbacks that look on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from torch import Tensor

from pfl_lm.align import AlignmentState
from pfl_lm.layout import Vector
from pfl_lm.train import AggregationRealignment, AlignmentTurn, GradientPreconditioner
from tests.world import World

RATE = 0.5


def offset_of(world: World, scale: float = 0.1) -> Vector:
    return world.vector(seed=2, scale=scale) - world.start


def turn_of(world: World, *, steps: int, **how: Any) -> AlignmentTurn:
    offset = how.pop("offset", offset_of(world))
    return AlignmentTurn(AlignmentState.zeros(len(world.start)), offset, steps, **how)


def mechanisms(world: World, turn: AlignmentTurn, **how: Any) -> list[L.Callback]:
    """Return both callbacks, in the order in which the method lists them."""
    rate = how.pop("rate", RATE)
    preconditioner = GradientPreconditioner(turn, world.adapter.layout, rate, **how)
    return [preconditioner, AggregationRealignment(turn)]


class Gradients(L.Callback):
    """Change the gradient of each optimizer step, before whatever is listed after it."""

    def __init__(self, change: Callable[[int, Tensor], None]) -> None:
        self.change = change
        self.steps = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.change(self.steps, pl_module.adapter.grads)
        self.steps += 1


class Recorder(L.Callback):
    """Note gradients and weights as they are at this place in the list of callbacks."""

    def __init__(self, turn: AlignmentTurn | None = None) -> None:
        self.turn = turn
        self.grads: list[Vector] = []
        self.before: list[Vector] = []
        self.after: list[Vector] = []
        self.states: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.grads.append(pl_module.adapter.grads.clone())
        self.before.append(pl_module.adapter.read())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.after.append(pl_module.adapter.read())
        if self.turn is not None:
            s = self.turn.state
            kept = (s.first_moment, s.second_moment, s.preconditioner)
            self.states.append([tensor.clone() for tensor in kept])


def silence(step: int, grads: Tensor) -> None:
    grads.zero_()

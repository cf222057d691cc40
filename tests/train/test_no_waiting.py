"""pFLAlign's share of a step asks no tensor for its numbers: a GPU's queue is never waited for."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import SGD, AdamW

import pfl_lm.train.alignment as alignment
from pfl_lm.align import AlignmentState, Correction
from pfl_lm.layout import AdapterLayout
from tests.train.parts import Gradients, mechanisms, turn_of
from tests.world import World, make_world

LAYOUT = AdapterLayout.of([("layers.0.q", "A", (2, 4)), ("layers.0.q", "B", (4, 2))])
SWITCHES = [
    (target, scale) for target in get_args(alignment.Target) for scale in get_args(alignment.Scale)
]


class Adapter:
    """An adapter's vectors without any numbers."""

    def __init__(self) -> None:
        self.weights = torch.empty(LAYOUT.d)
        self.grads = torch.empty(LAYOUT.d)

    def read(self) -> torch.Tensor:
        return self.weights.clone()

    def drop_grad(self) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[None]:
    """Make all tensors fake ones: one that is asked for a number raises."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield


def step(optimizer: type[torch.optim.Optimizer], target: Any, scale: Any, correction: Any) -> None:
    world: Any = SimpleNamespace(
        start=torch.empty(LAYOUT.d), adapter=SimpleNamespace(layout=LAYOUT)
    )
    offset, state = torch.empty(LAYOUT.d), AlignmentState.zeros(LAYOUT.d)
    turn = alignment.AlignmentTurn(state, offset, 2, correction=correction)
    callbacks = mechanisms(world, turn, target=target, scale=scale)
    module: Any = SimpleNamespace(adapter=Adapter())
    stepped = optimizer([torch.empty(3, requires_grad=True)], lr=0.1)
    for callback in callbacks:
        callback.on_train_batch_start(None, module, None, 0)  # type: ignore[arg-type]
    for callback in callbacks:
        callback.on_before_optimizer_step(None, module, stepped)  # type: ignore[arg-type]
    for callback in callbacks:
        callback.on_train_batch_end(None, module, None, None, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("correction", get_args(Correction))
@pytest.mark.parametrize(("target", "scale"), SWITCHES)
def test_a_step_with_sgd_asks_nothing(fake: None, target: Any, scale: Any, correction: Any) -> None:
    step(SGD, target, scale, correction)


@pytest.mark.parametrize(("target", "scale"), SWITCHES)
def test_a_step_with_adamw_asks_one_thing_only(
    fake: None, monkeypatch: pytest.MonkeyPatch, target: Any, scale: Any
) -> None:
    """Whether its own moments may move; and that after the moments of the turn are on their way."""
    with pytest.raises(DataDependentOutputException):
        step(AdamW, target, scale, "erf")
    seen: list[Any] = []

    def answered(turn: alignment.AlignmentTurn) -> bool:
        seen.append(turn.current)
        return False

    monkeypatch.setattr(alignment.AlignmentTurn, "is_left_out", answered)
    step(AdamW, target, scale, "erf")
    assert len(seen) == 1
    assert seen[0] is not None


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("target", "scale"), SWITCHES)
def test_a_fit_with_a_step_left_out_is_the_fit_without_it(
    world: World, optimizer: str, target: Any, scale: Any
) -> None:
    """To the bit, moments of AdamW and its count of steps included.

    Both fits see given gradients; the longer one sees one in the middle that is not finite.
    """
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(len(world.start), generator=generator) for _ in range(4)]
    bad = torch.full_like(given[0], 0.5)
    bad[7] = float("inf")
    found = []
    for grads in (given, [*given[:2], bad, *given[2:]]):
        turn = turn_of(world, steps=4)
        callbacks = [
            Gradients(lambda step, own, grads=grads: own.copy_(grads[step])),  # type: ignore[misc]
            *mechanisms(world, turn, target=target, scale=scale, rate=0.01),
        ]
        n = len(grads)
        run = world.trainer(steps=n, optimizer=optimizer, learning_rate=0.01)
        end = run.train(world.vector(), steps=n, callbacks=callbacks)
        state = turn.state
        found.append([end, state.first_moment, state.second_moment, state.preconditioner])
        assert turn.skipped == n - 4
        assert turn.summary()["gamma_mean"] > 0.1
        found[-1].append(turn.correction_taken())
    for without, with_it in zip(*found, strict=True):
        assert torch.equal(without, with_it)

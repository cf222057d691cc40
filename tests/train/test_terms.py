"""What is added to a gradient: once an optimizer step, to the whole window's, before the step."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from pfl_lm.train import GradientShift, ProximalTerm
from tests.train.parts import Gradients, Recorder, silence
from tests.world import World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def test_without_a_gradient_the_pull_halves_the_way_back(world: World) -> None:
    """g = μ (w - w_ref), so SGD takes w - w_ref times 1 - η μ: with 0.5 · 1, half of it a step."""
    start, reference = world.vector(), world.vector(seed=2)
    seen = Recorder()
    pull = ProximalTerm(reference, 1.0)
    end = world.trainer(learning_rate=0.5).train(
        start, steps=3, callbacks=[Gradients(silence), pull, seen]
    )
    for step, at in enumerate([*seen.before, end]):
        wanted = (start - reference) / 2**step
        torch.testing.assert_close(at - reference, wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(reference, world.vector(seed=2))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_added_is_added_once_a_window(world: World, accumulation: int) -> None:
    start, shift = world.vector(), world.vector(seed=3)
    reference = world.vector(seed=2)
    shape = {
        "per_device_train_batch_size": 2 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    bare, shifted, pulled = Recorder(), Recorder(), Recorder()
    world.trainer(**shape).train(start, steps=1, callbacks=[bare])
    world.trainer(**shape).train(start, steps=1, callbacks=[GradientShift(shift), shifted])
    pull = ProximalTerm(reference, 0.25)
    world.trainer(**shape).train(start, steps=1, callbacks=[pull, pulled])
    assert torch.equal(shifted.grads[0], bare.grads[0] + shift)
    torch.testing.assert_close(
        pulled.grads[0], bare.grads[0] + 0.25 * (start - reference), rtol=1e-6, atol=1e-8
    )


def test_a_pull_of_no_strength_changes_no_bit(world: World) -> None:
    start, far = world.vector(), torch.full_like(world.start, torch.inf)
    one = world.trainer().train(start, steps=3, callbacks=[ProximalTerm(far, 0.0)])
    assert torch.equal(one, world.trainer().train(start, steps=3))


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_is_not_trained_stays(world: World, factor: Literal["A", "B"]) -> None:
    layout, start = world.adapter.layout, world.vector()
    shift = GradientShift(torch.ones_like(start))
    pull = ProximalTerm(world.vector(seed=2), 1.0)
    end = world.trainer().train(start, steps=2, callbacks=[shift, pull], trainable=factor)
    other = "B" if factor == "A" else "A"
    assert torch.equal(layout.factor(end, other), layout.factor(start, other))
    assert not torch.equal(layout.factor(end, factor), layout.factor(start, factor))

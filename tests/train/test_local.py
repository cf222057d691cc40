"""A client's fit: where its numbers lie, and that how a window is cut up changes nothing."""

from __future__ import annotations

import pytest
import torch

from pfl_lm.layout import Vector
from pfl_lm.model.adapter import Adapter
from pfl_lm.train import PersonalizedLM
from tests.parity.plain import PlainClient
from tests.tiny import tiny_model
from tests.train.parts import Recorder, mechanisms, turn_of
from tests.world import World, make_world, options


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def test_everything_is_fp32_on_a_bfloat16_backbone() -> None:
    world = make_world("bfloat16")
    assert world.backbone.dtype == torch.bfloat16
    turn, record = turn_of(world, steps=2), Recorder()
    run = world.trainer(steps=2)
    end = run.train(world.vector(), steps=2, callbacks=[*mechanisms(world, turn), record])

    state = turn.state
    moments = (state.first_moment, state.second_moment, state.preconditioner)
    for vector in (end, world.adapter.weights, world.adapter.grads, *record.grads, *moments):
        assert vector.dtype == torch.float32
    assert {each.dtype for each in world.adapter.parameters()} == {torch.float32}
    assert not torch.equal(end, end.bfloat16().float())  # and not by name alone


def views_intact(adapter: Adapter, at: int) -> bool:
    """Whether PEFT's own parameters still are the vector at ``at``, each in its place."""
    live = dict(adapter.model.named_parameters())
    tied = []
    for (entry, view), parameter in zip(
        adapter.layout.views(adapter.weights), adapter.parameters(), strict=True
    ):
        tied.append(parameter.data_ptr() == view.data_ptr() == at + 4 * entry.start)
        tied.append(parameter.dtype == torch.float32 and parameter.shape == entry.shape)
        tied.append(any(parameter is each for each in live.values()))
    return all(tied)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_after_a_fit_the_parameters_still_are_the_one_vector(world: World, optimizer: str) -> None:
    at = world.adapter.weights.data_ptr()
    turn = turn_of(world, steps=2)
    run = world.trainer(steps=2, optimizer=optimizer)
    end = run.train(world.vector(), steps=2, callbacks=mechanisms(world, turn, target="update"))

    assert world.adapter.weights.data_ptr() == at
    assert views_intact(world.adapter, at)
    world.adapter.zero_grad()
    for (_, view), each in zip(
        world.adapter.layout.views(world.adapter.grads), world.adapter.parameters(), strict=True
    ):
        assert each.grad is not None
        assert each.grad.data_ptr() == view.data_ptr()
    assert torch.equal(world.adapter.read(), end)
    assert end.data_ptr() != at  # what a method is given is its own


def test_moving_the_module_moves_nothing(world: World) -> None:
    at, vector = world.adapter.weights.data_ptr(), world.vector()
    world.adapter.write(vector)
    module = PersonalizedLM(world.adapter, options())
    own = {id(parameter) for parameter in module.parameters()}
    assert own == {id(parameter) for parameter in world.adapter.parameters()}

    for moved in (
        module.to(torch.float64),
        module.to("meta"),
        module.cpu(),
        module.double(),
        module.half(),
        module.bfloat16(),
    ):
        assert moved is module
        assert views_intact(world.adapter, at)
        assert torch.equal(world.adapter.weights, vector)
    assert {each.dtype for each in world.backbone.model.parameters()} == {torch.float32}


# --- accumulation, and one gradient by itself -------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False])
def test_accumulation_1x4_equals_4x1(world: World, aligned: bool) -> None:
    """Rows of unequal length: the loss is a mean over the window's tokens, not of means."""
    rows = world.examples()
    assert len({row.n_supervised for row in rows}) > 3
    ends: list[Vector] = []
    losses: list[tuple[float, float]] = []
    for size, accumulation in ((1, 4), (2, 2), (4, 1)):
        turn = turn_of(world, steps=4)
        run = world.trainer(
            steps=4,
            rows=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        callbacks = mechanisms(world, turn) if aligned else []
        ends.append(run.train(world.vector(), steps=4, callbacks=callbacks))
        losses.append((run.summary["loss_first"], run.summary["loss_last"]))
    for end, told in zip(ends[:-1], losses[:-1], strict=True):
        torch.testing.assert_close(end, ends[-1], rtol=0, atol=1e-6)
        assert told == pytest.approx(losses[-1], rel=1e-5)
    assert (ends[0] - world.vector()).abs().max() > 1e-3


def test_loss_and_grad_are_those_of_a_plain_model(world: World) -> None:
    run, at = world.trainer(), world.vector()
    batch = next(iter(run._batches(1)))
    plain = PlainClient(tiny_model(), at)

    loss, grad = run.loss_and_grad(at, batch)

    wanted = plain.gradient(batch)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-8)
    assert grad.count_nonzero() > 0.9 * len(grad)
    logits = plain.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    picked = batch["labels"][:, 1:] != -100
    by_token = logits[:, :-1][picked].log_softmax(dim=-1)
    right = by_token.gather(1, batch["labels"][:, 1:][picked][:, None])
    assert loss == pytest.approx(-float(right.detach().mean()), rel=1e-5)
    kept = grad.clone()
    elsewhere, other = run.loss_and_grad(world.vector(seed=6), batch)
    again, same = run.loss_and_grad(at, batch)
    assert loss == again != elsewhere
    assert torch.equal(same, kept)  # nothing is left over from the call before
    assert torch.equal(grad, kept)  # nor does a call after change what was given
    assert not torch.equal(other, kept)


def test_loss_and_grad_sees_both_factors_whatever_was_trained_before(world: World) -> None:
    run, at = world.trainer(steps=1), world.vector()
    batch = next(iter(run._batches(1)))
    _, wanted = run.loss_and_grad(at, batch)
    end = run.train(at, steps=1, trainable="B")
    moved = end != at
    assert torch.equal(moved & world.adapter.layout.mask("A"), torch.zeros_like(moved))
    _, grad = run.loss_and_grad(at, batch)
    assert torch.equal(grad, wanted)

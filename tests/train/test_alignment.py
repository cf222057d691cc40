"""pFLAlign's callbacks inside real Lightning fits of the tiny backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pfl_lm.train.alignment as alignment
from pfl_lm.align import AlignmentState
from pfl_lm.layout import Vector
from pfl_lm.train import AlignmentTurn
from tests.train.parts import RATE, Gradients, Recorder, mechanisms, offset_of, silence, turn_of
from tests.world import World, make_world

RESCALED = [
    (target, scale) for target in ("gradient", "update") for scale in ("per_matrix", "match")
]


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


# --- a turn by itself -------------------------------------------------------------------------


def test_a_turn_forgets_the_first_moment_and_keeps_the_others() -> None:
    m, v, P = torch.ones(3), torch.full((3,), 2.0), torch.full((3,), 3.0)
    turn = AlignmentTurn(AlignmentState(m, v, P), torch.zeros(3), 2)
    assert turn.state.first_moment.tolist() == [0.0] * 3
    assert turn.state.second_moment.tolist() == [2.0] * 3
    assert turn.state.preconditioner.tolist() == [3.0] * 3


def test_a_gradient_that_is_not_finite_moves_nothing_of_a_turn() -> None:
    turn = AlignmentTurn(AlignmentState.zeros(3), torch.ones(3), 4)
    assert turn.current is None
    step = turn.observe(torch.ones(3))
    assert turn.current is step
    assert not turn.is_left_out()
    m, P = turn.state.first_moment.clone(), turn.state.preconditioner.clone()
    grad = torch.tensor([1.0, float("nan"), 1.0])
    assert turn.observe(grad).gamma.tolist() == grad.tolist() == [0.0] * 3
    assert turn.is_left_out()
    assert torch.equal(turn.state.first_moment, m)
    assert torch.equal(turn.state.preconditioner, P)
    assert turn.skipped == 1
    assert turn.summary() == {
        "preconditioner_mean": pytest.approx(0.01),
        "gamma_mean": pytest.approx(float(step.gamma.mean())),
        "correction_mean": pytest.approx(float(step.gamma.mean()) / 4),
        "offset_norm_before": pytest.approx(3**0.5),
        "skipped_steps": 1.0,
    }


# --- once per optimizer step ------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("target", ["gradient", "update"])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_moments_see_one_gradient_per_optimizer_step(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    accumulation: int,
    target: alignment.Target,
    enabled: bool,
) -> None:
    seen: list[Vector] = []
    step = alignment.alignment_step

    def counted(state: AlignmentState, grad: Vector, *args: Any, **options: Any) -> Any:
        seen.append(grad.clone())
        return step(state, grad, *args, **options)

    monkeypatch.setattr(alignment, "alignment_step", counted)
    turn, raw = turn_of(world, steps=3), Recorder()
    callbacks = [raw, *mechanisms(world, turn, target=target, enabled=enabled)]
    run = world.trainer(steps=3, gradient_accumulation_steps=accumulation)
    run.train(world.vector(), steps=3, callbacks=callbacks)

    assert len(seen) == 3
    assert len(raw.after) == 3 * accumulation
    assert all(torch.equal(a, b) for a, b in zip(seen, raw.grads, strict=True))
    assert run.summary["steps_done"] == 3


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize(("correction", "kept"), [("full", 0.0), ("half", 0.5), ("none", 1.0)])
def test_a_turn_of_T_optimizer_steps_takes_off_its_share_of_the_offset(
    world: World, accumulation: int, correction: Any, kept: float
) -> None:
    """With the gradients silenced, gamma = 1 ends at w_g + offset - offset."""
    shared, turn = world.vector(), turn_of(world, steps=4, correction=correction)
    callbacks = [Gradients(silence), *mechanisms(world, turn)]
    run = world.trainer(steps=4, gradient_accumulation_steps=accumulation)

    end = run.train(shared + turn.offset, steps=4, callbacks=callbacks)

    torch.testing.assert_close(end, shared + kept * turn.offset, rtol=0, atol=1e-6)
    assert turn.offset.abs().max() > 0.2
    assert turn.summary()["correction_mean"] == pytest.approx(1 - kept)


def test_full_correction_ends_where_a_start_without_offset_does(world: World) -> None:
    """On one path of gradients: w_g + offset, corrected, against w_g and no correction."""
    generator = torch.Generator().manual_seed(3)
    path = 0.3 * torch.randn(5, len(world.start), generator=generator)

    def follow(step: int, grads: Tensor) -> None:
        grads.copy_(path[step])

    shared, ends = world.vector(), []
    for correction, begin in (("full", shared + offset_of(world)), ("none", shared)):
        turn = turn_of(world, steps=5, correction=correction)
        callbacks = [Gradients(follow), *mechanisms(world, turn)]
        ends.append(world.trainer(steps=5).train(begin, steps=5, callbacks=callbacks))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)
    assert (ends[0] - shared).abs().max() > 0.01


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_correction_follows_the_step_that_it_belongs_to(
    world: World, accumulation: int
) -> None:
    """w ← w - η P ⊙ g - (1/T) γ ⊙ Δ, with this step's own P and γ, and T the optimizer steps."""
    turn = turn_of(world, steps=3)
    first, last = Recorder(), Recorder()
    callbacks = [*mechanisms(world, turn), last]
    run = world.trainer(steps=3, gradient_accumulation_steps=accumulation, learning_rate=RATE)
    run.train(world.vector(), steps=3, callbacks=[first, *callbacks])

    ends = last.after[accumulation - 1 :: accumulation]  # after each window
    state = AlignmentState.zeros(len(world.start))
    for grad, before, after in zip(first.grads, first.before, ends, strict=True):
        P, gamma = alignment.alignment_step(state, grad, turn.offset)
        wanted = before - RATE * P * grad - gamma * turn.offset / 3
        torch.testing.assert_close(after, wanted, rtol=0, atol=1e-6)
    between = [w for i, w in enumerate(last.after) if i % accumulation != accumulation - 1]
    assert all(torch.equal(a, b) for a, b in zip(between, first.before, strict=False))


# --- a gradient that is not finite ------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("target", ["gradient", "update"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(
    world: World, bad: float, target: alignment.Target, optimizer: str
) -> None:
    def poison(step: int, grads: Tensor) -> None:
        if step == 1:
            grads[5] = bad

    turn = turn_of(world, steps=4)
    record = Recorder(turn)
    callbacks = [Gradients(poison), *mechanisms(world, turn, target=target, rate=0.01), record]
    run = world.trainer(steps=4, optimizer=optimizer, learning_rate=0.01)
    end = run.train(world.vector(), steps=4, callbacks=callbacks)

    assert torch.equal(record.after[1], record.after[0])
    for after, before in zip(record.states[1], record.states[0], strict=True):
        assert torch.equal(after, before)
    for step in (0, 2, 3):
        assert not torch.equal(record.after[step], record.before[step])
        assert not torch.equal(record.states[step][1], record.states[step - 1][1])
    assert end.isfinite().all()
    assert turn.skipped == 1
    assert turn.summary()["skipped_steps"] == 1.0


def test_where_every_gradient_is_not_finite_the_turn_ends_where_it_began(world: World) -> None:
    turn = turn_of(world, steps=2)
    callbacks = [Gradients(lambda step, grads: grads.fill_(float("nan")))]
    callbacks += mechanisms(world, turn)
    end = world.trainer(steps=2).train(world.vector(), steps=2, callbacks=callbacks)
    assert torch.equal(end, world.vector())
    assert turn.skipped == 2
    assert turn.state.second_moment.count_nonzero() == 0
    assert turn.summary()["gamma_mean"] == 0.0


# --- the preconditioner's switches ------------------------------------------------------------


@pytest.mark.parametrize("target", ["gradient", "update"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_switched_off_it_leaves_every_bit_alone_while_the_moments_go_on(
    world: World, target: alignment.Target, optimizer: str
) -> None:
    how = {"steps": 4, "optimizer": optimizer, "learning_rate": 0.03}
    plain = Recorder()
    wanted = world.trainer(**how).train(world.vector(), steps=4, callbacks=[plain])

    turn, record = turn_of(world, steps=4), Recorder()
    off = mechanisms(world, turn, enabled=False, target=target, rate=0.03)[0]
    end = world.trainer(**how).train(world.vector(), steps=4, callbacks=[off, record])

    assert all(torch.equal(a, b) for a, b in zip(record.grads, plain.grads, strict=True))
    assert torch.equal(end, wanted)
    assert turn.state.second_moment.count_nonzero() > 0.9 * len(end)
    assert turn.state.first_moment.count_nonzero() > 0.9 * len(end)


def test_the_gradient_is_multiplied_by_P(world: World) -> None:
    turn = turn_of(world, steps=3)
    raw, scaled = Recorder(), Recorder(turn)
    callbacks = [raw, *mechanisms(world, turn), scaled]
    world.trainer().train(world.vector(), steps=3, callbacks=callbacks)
    for g, Pg, (_, _, P) in zip(raw.grads, scaled.grads, scaled.states, strict=True):
        assert torch.equal(Pg, P * g)
    torch.testing.assert_close(scaled.grads[0], 0.01 * raw.grads[0])  # P is (1-β)² at first


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("target", "scale"), RESCALED)
def test_each_matrix_is_rescaled_within_itself(
    world: World, target: alignment.Target, scale: alignment.Scale, optimizer: str
) -> None:
    """per_matrix: root mean square 1, times the rate for an update; match: the base's own."""
    turn = turn_of(world, steps=3, offset=torch.zeros_like(world.start))
    base, final = Recorder(), Recorder(turn)
    callbacks = [base, *mechanisms(world, turn, target=target, scale=scale), final]
    run = world.trainer(learning_rate=RATE, optimizer=optimizer)
    run.train(world.vector(), steps=3, callbacks=callbacks)

    for step in range(3):
        # At `base` the gradient, and the weights after the optimizer, are not yet touched.
        if target == "gradient":
            raw, done, unit = base.grads[step], final.grads[step], 1.0
        else:
            before = base.before[step]
            raw, done, unit = base.after[step] - before, final.after[step] - before, RATE
        P = final.states[step][2]
        for entry in world.adapter.layout.entries:
            part = slice(entry.start, entry.stop)
            own, ended = raw[part].double(), done[part].double()
            wanted = unit if scale == "per_matrix" else float(own.square().mean().sqrt())
            assert float(ended.square().mean().sqrt()) == pytest.approx(wanted, rel=1e-4)
            direction = P[part].double() * own
            cosine = direction @ ended / (direction.norm() * ended.norm())
            assert float(cosine) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("target", "scale"), RESCALED)
def test_a_matrix_without_a_gradient_is_not_moved(
    world: World, target: alignment.Target, scale: alignment.Scale
) -> None:
    """At first B is 0 and so are all gradients of A: nothing to rescale, and no 0/0."""
    turn = turn_of(world, steps=1, offset=torch.zeros_like(world.start))
    callbacks = mechanisms(world, turn, target=target, scale=scale)
    end = world.trainer(steps=1).train(world.start, steps=1, callbacks=callbacks)
    moved = end != world.start
    assert not moved[world.adapter.layout.mask("A")].any()
    assert moved[world.adapter.layout.mask("B")].float().mean() > 0.9
    assert end.isfinite().all()

"""float16: gradients are scaled on their way, and a step that overflows moves nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from pfl_lm.train import GradientShift, LocalTrainer, Moments, ProximalTerm
from pfl_lm.train.scaling import scaling_for
from tests.train.parts import Recorder, mechanisms, offset_of, turn_of
from tests.world import World, make_world

T = 4


@pytest.fixture(scope="module")
def half() -> World:
    return make_world("float16")


class Overflow(L.Callback):
    """Put an infinity into the gradient of one step, as it is when the backward pass is over."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.steps = 0

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self.steps == self.at:
            pl_module.adapter.grads[5] = torch.inf
        self.steps += 1


def added(world: World, name: str) -> list[L.Callback]:
    match name:
        case "fedprox":
            return [ProximalTerm(world.start, 0.5)]
        case "scaffold":
            return [GradientShift(torch.full_like(world.start, 0.01))]
    return []


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_that_overflows_moves_nothing(
    half: World, name: str, optimizer: str, at: int
) -> None:
    ticks: list[int] = []
    run = half.trainer(steps=T, optimizer=optimizer, learning_rate=0.01)
    run.onlookers.append(Ticks(ticks))
    record = Recorder()
    moments = Moments.zeros(len(half.start)) if optimizer == "adamw" else None
    copies: list[tuple[Tensor, Tensor]] = []
    watch = Copies(moments, copies)
    callbacks = [*added(half, name), Overflow(at), record, watch]
    run.train(half.vector(), steps=T, callbacks=callbacks, moments=moments)

    moved = [not torch.equal(*pair) for pair in zip(record.before, record.after, strict=True)]
    assert moved == [step != at for step in range(T)]
    assert record.after[-1].isfinite().all()
    assert len(ticks) == T  # it is one of the T
    assert run.summary["steps_done"] == T
    assert run.summary["skipped_steps"] == 1
    assert run.summary["loss_scale"] == 2.0**15
    assert run.summary["loss_scale_steps"] == T - 1 - at
    if moments is not None:
        assert moments.step == T - 1
        before = copies[at - 1] if at else [torch.zeros_like(half.start)] * 2
        assert torch.equal(copies[at][0], before[0])
        assert torch.equal(copies[at][1], before[1])
        assert not torch.equal(copies[-1][0], before[0])


class Ticks(L.Callback):
    def __init__(self, ticks: list[int]) -> None:
        self.ticks = ticks

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.ticks.append(trainer.global_step)


class Copies(L.Callback):
    def __init__(self, moments: Moments | None, copies: list[tuple[Tensor, Tensor]]) -> None:
        self.moments = moments
        self.copies = copies

    def on_train_batch_end(self, *args: Any) -> None:
        if self.moments is not None:
            self.copies.append((self.moments.first.clone(), self.moments.second.clone()))


def test_what_comes_after_goes_on_as_if_the_step_had_not_been(half: World) -> None:
    """AdamW by hand on the gradients of the steps that were taken."""
    run = half.trainer(steps=T, optimizer="adamw", learning_rate=0.01)
    record = Recorder()
    end = run.train(half.vector(), steps=T, callbacks=[Overflow(1), record])
    weights = half.vector().requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=0.01, weight_decay=0.0)
    for step, grad in enumerate(record.grads):
        if step != 1:
            weights.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(end, weights.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("target", ["gradient", "update"])
def test_pflaligns_statistics_leave_it_out(half: World, optimizer: str, target: Any) -> None:
    turn = turn_of(half, steps=T, offset=offset_of(half))
    record = Recorder(turn)
    run = half.trainer(steps=T, optimizer=optimizer, learning_rate=0.01)
    callbacks = [Overflow(2), *mechanisms(half, turn, rate=0.01, target=target), record]
    run.train(half.vector(), steps=T, callbacks=callbacks)
    for kept, before in zip(record.states[2], record.states[1], strict=True):
        assert torch.equal(kept, before)
    assert not torch.equal(record.states[3][0], record.states[2][0])
    assert torch.equal(record.after[2], record.before[2])  # no correction either
    assert turn.skipped == run.summary["skipped_steps"] == 1
    taken = turn.correction_taken().mean()
    assert 0 < float(taken) < 3 / T


def test_in_a_window_of_several_the_whole_step_is_left_out(half: World) -> None:
    run = half.trainer(steps=2, gradient_accumulation_steps=3)
    end = run.train(half.vector(), steps=1, callbacks=[Overflow(1)])
    assert torch.equal(end, half.vector())
    assert run.summary["skipped_steps"] == 1


def test_real_overflow_finds_its_scale(half: World) -> None:
    """At 2³⁰ nothing fits into float16; the scale falls until it does."""
    run = scaled(half, {"loss_scale": 2.0**30}, steps=25)
    end = run.train(half.vector(), steps=25)
    assert 0 < run.summary["skipped_steps"] < 25
    assert run.summary["loss_scale"] == 2.0 ** (30 - run.summary["skipped_steps"])
    assert not torch.equal(end, half.vector())


def scaled(world: World, before: dict[str, float], steps: int = 1) -> LocalTrainer:
    run = world.trainer(steps=steps, learning_rate=0.01)
    run.scaling = scaling_for(world.adapter, before)
    return run


def test_the_scale_goes_on_from_the_last_turn_and_grows(half: World) -> None:
    run = scaled(half, {"loss_scale": 64.0, "loss_scale_steps": 1999.0})
    run.train(half.vector(), steps=1)
    assert (run.summary["loss_scale"], run.summary["loss_scale_steps"]) == (128.0, 0.0)
    kept = scaled(half, run.summary)
    kept.train(half.vector(), steps=1)
    assert (kept.summary["loss_scale"], kept.summary["loss_scale_steps"]) == (128.0, 1.0)


def test_scaling_is_what_keeps_small_gradients(
    half: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss a thousand million times as small has the same direction, and none without a scale."""
    small = scale_losses(monkeypatch, 1e-6)
    with_scale = first_gradient(scaled(half, {}), half)
    plain = half.trainer(steps=1)
    plain.scaling = None
    without = first_gradient(plain, half)
    small()
    wanted = first_gradient(scaled(half, {}), half) * 1e-6
    assert cosine(with_scale, wanted) > 0.999
    assert cosine(without, wanted) < 0.99


def scale_losses(monkeypatch: pytest.MonkeyPatch, by: float) -> Callable[[], None]:
    import pfl_lm.train.module as module

    plain = module.nll_sum
    monkeypatch.setattr(module, "nll_sum", lambda *given: plain(*given) * by)
    return lambda: monkeypatch.setattr(module, "nll_sum", plain)


def first_gradient(run: LocalTrainer, world: World) -> Tensor:
    record = Recorder()
    run.train(world.vector(), steps=1, callbacks=[record])
    return record.grads[0]


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def test_a_gradient_outside_of_fits_is_scaled_until_it_fits(
    half: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_world()
    at = half.vector()
    run = half.trainer()
    [batch] = next(iter(run.windows(1)))
    loss, grad = run.loss_and_grad(at, batch)
    wanted_loss, wanted = plain.trainer().loss_and_grad(at, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-2)
    assert cosine(grad, wanted) > 0.999
    assert float(grad.norm()) == pytest.approx(float(wanted.norm()), rel=2e-2)
    monkeypatch.setattr("pfl_lm.train.local.FIRST_SCALE", 2.0**40)
    _, again = run.loss_and_grad(at, batch)
    assert again.isfinite().all()
    assert cosine(again, grad) > 0.999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_else_is_scaled(dtype: str) -> None:
    world = make_world(dtype)
    run = world.trainer(steps=1)
    assert run.scaling is None
    run.train(world.vector(), steps=1)
    assert not {"skipped_steps", "loss_scale"} & run.summary.keys()


def test_nothing_is_cast_on_the_way(half: World) -> None:
    """The adapter's own products stay float32, as without a scale."""
    kinds: set[torch.dtype] = set()
    hooks = list(_watch_adapter(half, kinds))
    half.trainer(steps=1).train(half.vector(), steps=1)
    for hook in hooks:
        hook.remove()
    assert kinds == {torch.float32}


def _watch_adapter(world: World, kinds: set[torch.dtype]) -> Iterator[Any]:
    for name, module in world.adapter.model.named_modules():
        if "lora_A" in name and hasattr(module, "weight"):
            yield module.register_forward_hook(lambda m, given, out: kinds.add(out.dtype))

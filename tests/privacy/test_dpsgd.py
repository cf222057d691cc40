"""Clipping, summing, noise: by hand, against Opacus' own optimizer, and by their statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pfl_lm.data.batches import collate
from pfl_lm.privacy.dpsgd import PrivateGradient, RecordLevel
from pfl_lm.recipe import RecordLevelOptions
from pfl_lm.train.loss import mean_nll_by_row
from tests.parity.plain import PlainClient
from tests.privacy.by_hand import gradient_of, private_gradient
from tests.tiny import tiny_model
from tests.world import World, make_world

SILENT = 1e-12


@pytest.fixture(scope="module")
def world() -> World:
    world = make_world()
    world.adapter.write(world.vector())
    world.adapter.model.train()
    return world


def lever(sigma: float = SILENT, clip: float = 0.1) -> RecordLevelOptions:
    return RecordLevelOptions(noise_multiplier=sigma, max_grad_norm=clip, delta=1e-5)


def make(world: World, *, expected: float = 4, seed: int = 3, **how: Any) -> PrivateGradient:
    world.adapter.train_only(how.pop("trainable", None))
    world.adapter.zero_grad()
    return PrivateGradient(world.adapter, lever(**how), seed=seed, expected_rows=expected)


def add(world: World, private: PrivateGradient, first: int, last: int) -> None:
    batch = collate(world.examples()[first:last], world.backbone.pad_token_id)
    private.add(mean_nll_by_row(world.adapter.model, batch))


def norms(world: World) -> list[float]:
    alone = PlainClient(tiny_model(), world.vector())
    return [float(gradient_of(alone, row).norm()) for row in world.examples()]


@pytest.mark.parametrize("clip", [1e-3, "middle", 1e3])
def test_each_row_is_clipped_by_itself_over_all_matrices(world: World, clip: Any) -> None:
    """With a clip between the rows' norms some are shortened and others are not."""
    known = sorted(norms(world)[:5])
    bound = (known[1] + known[2]) / 2 if clip == "middle" else clip
    private = make(world, clip=bound)
    with private.watching():
        add(world, private, 0, 3)
        add(world, private, 3, 5)
        private.release()

    alone = PlainClient(tiny_model(), world.vector())
    rows = [gradient_of(alone, row) for row in world.examples()[:5]]
    silence = torch.zeros(len(world.start))
    wanted = private_gradient(rows, silence, clip=bound, sigma=0, expected=4)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(world.adapter.grads.double(), wanted, rtol=1e-3, atol=1e-5 * scale)


def test_no_row_moves_the_sum_by_more_than_the_clip(world: World) -> None:
    """The sensitivity that the accounting stands on, for every row and however large it is."""
    bound = 0.5 * min(norms(world))
    for row in range(6):
        private = make(world, clip=bound, expected=1)
        with private.watching():
            add(world, private, row, row + 1)
            private.release()
        assert float(world.adapter.grads.norm()) == pytest.approx(bound, rel=1e-4)
        assert float(world.adapter.grads.norm()) <= bound * (1 + 1e-6)


def test_opacus_optimizer_says_the_same(world: World) -> None:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    bound = sorted(norms(world)[:4])[2]
    private = make(world, clip=bound)
    with private.watching():
        add(world, private, 0, 4)
        private.release()
    ours = world.adapter.grads.clone()

    theirs = PlainClient(tiny_model(), world.vector())
    theirs.model.train()
    wrapped = GradSampleModule(theirs.model, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(theirs.parameters, lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=4,
    )
    batch = collate(world.examples()[:4], world.backbone.pad_token_id)
    torch.autograd.backward(mean_nll_by_row(wrapped, batch).mean())
    optimizer.pre_step()
    wanted = torch.cat([each.grad.flatten() for each in theirs.parameters])  # type: ignore[union-attr]
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-8)


def test_the_noise_has_the_variance_that_is_accounted_for(world: World) -> None:
    """std = σ C / (q n), by itself in a step without rows, and independent from step to step."""
    sigma, clip, expected = 1.5, 0.2, 3.0
    private = make(world, sigma=sigma, clip=clip, expected=expected)
    steps = []
    for _ in range(60):
        private.release()
        steps.append(world.adapter.grads.clone())
    drawn = torch.stack(steps).double()
    assert private.released == 60
    wanted = sigma * clip / expected
    n = drawn.numel()
    assert float(drawn.mean()) == pytest.approx(0, abs=4 * wanted / n**0.5)
    assert float(drawn.std()) == pytest.approx(wanted, rel=4 / (2 * n) ** 0.5)
    assert float((drawn / wanted).pow(4).mean()) == pytest.approx(3, rel=0.03)  # as a normal has it
    correlations = torch.corrcoef(drawn)
    off_diagonal = correlations - torch.eye(60)
    assert float(off_diagonal.abs().max()) < 6 / drawn.shape[1] ** 0.5


def test_noise_and_rows_add_up(world: World) -> None:
    ends = []
    for sigma, rows in ((SILENT, True), (1.0, False), (1.0, True)):
        private = make(world, sigma=sigma)
        with private.watching():
            if rows:
                add(world, private, 0, 4)
            private.release()
        ends.append(world.adapter.grads.clone())
    torch.testing.assert_close(ends[0] + ends[1], ends[2], rtol=1e-5, atol=1e-7)


def released(world: World, seed: int) -> Tensor:
    private = make(world, sigma=1.0, seed=seed)
    with private.watching():
        add(world, private, 0, 2)
        private.release()
    return world.adapter.grads.clone()


def test_one_seed_gives_one_gradient_whatever_the_global_generator_does(world: World) -> None:
    first = released(world, 3)
    torch.manual_seed(99)
    torch.rand(5)
    assert torch.equal(released(world, 3), first)
    assert not torch.equal(released(world, 4), first)


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 3e38])
def test_a_row_without_a_finite_gradient_counts_as_zero(world: World, factor: float) -> None:
    """Its gradient is beyond any clipping; it must neither spoil the sum nor tell on itself."""
    private = make(world)
    with private.watching():
        add(world, private, 0, 3)
        private.release()
    wanted = world.adapter.grads.clone()

    private = make(world)
    batch = collate(world.examples()[:4], world.backbone.pad_token_id)
    with private.watching():
        losses = mean_nll_by_row(world.adapter.model, batch)
        broken = torch.tensor([1.0, 1.0, 1.0, factor])
        private.add(losses * broken)
        private.release()
    torch.testing.assert_close(world.adapter.grads, wanted, rtol=1e-4, atol=1e-8)
    assert world.adapter.grads.isfinite().all()


def test_an_infinite_gradient_counts_as_zero(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = world.adapter.layout.entries[0]
    rows = torch.full((3, *entry.shape), 1e-3)
    rows[1, 0, 0] = float("inf")
    monkeypatch.setattr("pfl_lm.privacy.dpsgd.take_rows", lambda adapter, n: [(entry, rows)])
    private = make(world, clip=1e3)
    private.add(torch.ones(3, requires_grad=True))
    private.release()
    assert torch.allclose(world.adapter.grads[: entry.stop], torch.tensor(2e-3 / 4))


def test_what_is_not_trained_gets_no_noise(world: World) -> None:
    private = make(world, sigma=1.0, trainable="B")
    with private.watching():
        add(world, private, 0, 2)
        private.release()
    frozen = world.adapter.layout.mask("A")
    assert torch.equal(world.adapter.grads[frozen], torch.zeros(int(frozen.sum())))
    assert (world.adapter.grads[~frozen] != 0).all()
    world.adapter.train_only(None)


def test_each_fit_of_a_turn_has_rows_and_noise_of_its_own(world: World) -> None:
    lever_of_turn = RecordLevel(lever(), seed=8012)
    seeds = {lever_of_turn.sampling_seed(fit) for fit in range(3)}
    gradients = [lever_of_turn.gradient(world.adapter, fit, 2.0) for fit in range(3)]
    seeds |= {private._generator.initial_seed() for private in gradients}
    assert len(seeds) == 6
    assert "8012" not in repr(lever_of_turn)

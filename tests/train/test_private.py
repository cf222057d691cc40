"""A client's fit by DP-SGD: Lightning's end is that of a loop by hand, and views stay views."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pfl_lm.errors import RecipeError
from pfl_lm.layout import Vector
from pfl_lm.privacy.dpsgd import RecordLevel
from pfl_lm.recipe import RecordLevelOptions
from pfl_lm.train import LocalTrainer, Moments
from tests.privacy.by_hand import drawn, sgd_fit
from tests.train.parts import Recorder, mechanisms, turn_of
from tests.train.test_local import views_intact
from tests.world import World, make_world

SEED = 20
CLIP = 0.4


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def trainer(
    world: World, *, sigma: float = 0.7, clip: float = CLIP, seed: int = SEED, **how: Any
) -> LocalTrainer:
    run = world.trainer(**how)
    options = RecordLevelOptions(noise_multiplier=sigma, max_grad_norm=clip, delta=1e-5)
    run.private = RecordLevel(options, seed)
    return run


def test_a_fit_is_dp_sgd_by_hand(world: World) -> None:
    """Poisson rows, one of the steps empty, rows clipped and not, noise, the mean expected size."""
    run = trainer(world, steps=12, per_device_train_batch_size=1)
    rate = 1 / len(run.examples)
    rows = drawn(SEED, 12, len(run.examples), rate)
    assert [] in rows
    assert max(map(len, rows)) > 1  # more than one micro-batch
    end = run.train(world.vector(), steps=12)
    wanted = sgd_fit(
        world.vector(), run.examples, seed=SEED, steps=12, rate=rate, lr=0.5, clip=CLIP, sigma=0.7
    )
    torch.testing.assert_close(end.double(), wanted, rtol=0, atol=2e-6)
    assert float((end - world.vector()).abs().max()) > 1e-2
    quiet = trainer(world, steps=12, sigma=1e-12, per_device_train_batch_size=1)
    without = quiet.train(world.vector(), steps=12)
    wanted = sgd_fit(
        world.vector(), run.examples, seed=SEED, steps=12, rate=rate, lr=0.5, clip=CLIP, sigma=0
    )
    torch.testing.assert_close(without.double(), wanted, rtol=0, atol=2e-6)


def test_a_step_larger_than_the_client_takes_every_row_each_time(world: World) -> None:
    run = trainer(world, steps=2, per_device_train_batch_size=64)
    end = run.train(world.vector(), steps=2)
    how = {"seed": SEED, "steps": 2, "rate": 1.0, "lr": 0.5, "clip": CLIP, "sigma": 0.7}
    wanted = sgd_fit(world.vector(), run.examples, **how)  # type: ignore[arg-type]
    torch.testing.assert_close(end.double(), wanted, rtol=0, atol=2e-6)
    assert run.summary["dp_sample_rate"] == 1.0


def test_how_a_step_is_cut_up_changes_nothing(world: World) -> None:
    ends = [
        trainer(
            world,
            steps=4,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        ).train(world.vector(), steps=4)
        for size, accumulation in ((1, 4), (2, 2), (4, 1))
    ]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-6)


def test_one_secret_gives_one_end(world: World) -> None:
    def end(seed: int) -> Vector:
        return trainer(world, steps=3, seed=seed, sigma=1.0).train(world.vector(), steps=3)

    assert torch.equal(end(1), end(1))
    assert not torch.equal(end(1), end(2))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_parameters_still_are_the_one_vector(world: World, optimizer: str) -> None:
    at = world.adapter.weights.data_ptr()
    run = trainer(world, steps=3, optimizer=optimizer)
    end = run.train(world.vector(), steps=3)
    assert views_intact(world.adapter, at)
    assert torch.equal(world.adapter.read(), end)
    # and an ordinary fit on the same adapter is what it was
    after = world.trainer(steps=2).train(world.vector(), steps=2)
    fresh = make_world()
    assert torch.equal(after, fresh.trainer(steps=2).train(fresh.vector(), steps=2))


def test_what_pflalign_sees_is_the_private_gradient(world: World) -> None:
    """A callback listed first already finds it in the flat vector; m is a mean of such."""
    private = Recorder()
    trainer(world, steps=3, sigma=1.0).train(world.vector(), steps=3, callbacks=[private])
    turn, record = turn_of(world, steps=3), Recorder()
    run = trainer(world, steps=3, sigma=1.0)
    run.train(world.vector(), steps=3, callbacks=[record, *mechanisms(world, turn)])

    assert torch.equal(record.grads[0], private.grads[0])  # both at the same weights
    wanted = torch.zeros_like(world.start)
    for grad in record.grads:
        wanted = 0.9 * wanted + 0.1 * grad
    torch.testing.assert_close(turn.state.first_moment, wanted)
    assert turn.skipped == 0


def test_a_private_turn_tells_its_steps_and_no_loss(world: World) -> None:
    run = trainer(world, steps=3)
    run.train(world.vector(), steps=3)
    assert run.summary == {
        "steps_done": 3.0,
        "dp_steps": 3.0,
        "dp_sample_rate": 2 / len(run.examples),
        "dp_noise_multiplier": 0.7,
    }


def test_a_turn_of_two_fits_spends_both_and_repeats_no_noise(world: World) -> None:
    run = trainer(world, steps=2, sigma=1.0, clip=1e-6)
    records = [Recorder(), Recorder()]
    for record in records:
        run.train(world.vector(), steps=2, callbacks=[record])
    assert run.summary["dp_steps"] == 4.0
    grads = torch.stack([*records[0].grads, *records[1].grads])
    off_diagonal = torch.corrcoef(grads) - torch.eye(4)
    assert float(off_diagonal.abs().max()) < 0.2


def test_only_one_factor_trained(world: World) -> None:
    end = trainer(world, steps=2).train(world.vector(), steps=2, trainable="B")
    moved = end != world.vector()
    assert torch.equal(moved, world.adapter.layout.mask("B"))


def test_moments_go_on(world: World) -> None:
    moments = Moments.zeros(len(world.start))
    trainer(world, steps=3, optimizer="adamw").train(world.vector(), steps=3, moments=moments)
    assert moments.step == 3
    assert (moments.second > 0).all()  # noise reaches every number


def test_nothing_is_read_beside_the_noise(world: World) -> None:
    run = trainer(world)
    batch = next(iter(run._batches(1)))
    for ask in (
        lambda: run.loss_and_grad(world.vector(), batch),
        lambda: run.mean_loss(world.vector(), 1),
    ):
        with pytest.raises(RecipeError) as caught:
            ask()
        assert caught.value.message == (
            "privacy.record_level: this method reads losses or gradients outside of training, "
            "where no noise is added"
        )
        assert caught.value.hint == "leave privacy.record_level out, or choose another method"

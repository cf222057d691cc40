"""A rank's part of a turn: parts add up to the whole, once a step, before anything sees the sum."""

from __future__ import annotations

import pytest
import torch

from pfl_lm.evaluate import score
from pfl_lm.train import LocalTrainer
from tests.train.parts import Recorder
from tests.train.shares import Noted
from tests.world import World, make_world

N_RANKS = 3


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def sharing(run: LocalTrainer, share: Noted) -> LocalTrainer:
    run.share = share
    return run


def trainer(world: World, accumulation: int = 1) -> LocalTrainer:
    return world.trainer(
        steps=2,
        rows=world.examples(n_rows=7),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
    )


@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_first_gradients_of_a_fit_add_up_to_that_of_the_whole_step(
    world: World, accumulation: int
) -> None:
    whole = Recorder()
    run = trainer(world, accumulation)
    run.train(world.vector(), steps=2, callbacks=[whole])
    parts = []
    for rank in range(N_RANKS):
        share = Noted(rank, N_RANKS)
        sharing(trainer(world, accumulation), share).train(world.vector(), steps=1)
        gradient, losses = share.parts  # one sum a step, and one of the losses
        parts.append(gradient)
        assert losses.shape == (1,)
    torch.testing.assert_close(sum(parts), whole.grads[0], rtol=1e-5, atol=1e-7)


def test_a_method_sees_the_sum_and_no_part(world: World) -> None:
    seen = Recorder()
    run = sharing(trainer(world, 4), Noted(0, whole=0.25))
    run.train(world.vector(), steps=2, callbacks=[seen])
    assert [set(grad.tolist()) for grad in seen.grads] == [{0.25}, {0.25}]
    torch.testing.assert_close(seen.after[-1], world.vector() - 2 * 0.5 * 0.25)  # SGD at 0.5


def test_losses_are_those_of_all_rows(world: World) -> None:
    run = trainer(world)
    run.train(world.vector(), steps=1)
    parts = []
    for rank in range(N_RANKS):
        share = Noted(rank, N_RANKS)
        sharing(trainer(world), share).train(world.vector(), steps=1)
        parts.append(float(share.parts[-1]))
    assert sum(parts) == pytest.approx(run.summary["loss_first"], rel=1e-6)


def test_numbers_outside_of_fits_add_up_too(world: World) -> None:
    run, at = trainer(world, 2), world.vector()
    [batch, _] = next(iter(run.windows(1)))
    loss, grad = run.loss_and_grad(at, batch)
    mean = run.mean_loss(at, 2)
    grads, means = [], []
    for rank in range(N_RANKS):
        share = Noted(rank, N_RANKS)
        part = sharing(trainer(world, 2), share)
        assert [len(window) for window in part.windows(2)] == [2, 2]  # whole ones
        part.loss_and_grad(at, batch)
        part.mean_loss(at, 2)
        grads.append(share.parts[0])
        means.append(share.parts[1])
    torch.testing.assert_close(sum(grads), torch.cat([grad, torch.tensor([loss])]))
    assert float(sum(means).mean()) == pytest.approx(mean, rel=1e-6)


def test_a_rank_without_a_row_adds_nothing_and_is_there(world: World) -> None:
    share = Noted(2, N_RANKS)
    run = world.trainer(steps=2, rows=world.examples(n_rows=1), per_device_train_batch_size=1)
    end = sharing(run, share).train(world.vector(), steps=2)
    assert [float(part.abs().sum()) for part in share.parts] == [0.0, 0.0, 0.0]
    assert torch.equal(end, world.vector())
    assert run.loss_and_grad(end, next(iter(run.windows(1)))[0])[0] == 0.0


def test_each_rank_drops_out_by_itself() -> None:
    dropping = make_world(lora_dropout=0.5)
    firsts = []
    for rank in (0, 0, 1):
        share = Noted(rank, 2)
        run = dropping.trainer(steps=1, rows=dropping.examples()[:1] * 2)  # alike on both ranks
        sharing(run, share).train(dropping.vector(), steps=1)
        firsts.append(share.parts[0])
    assert torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[0], firsts[2])


@pytest.mark.parametrize("n_rows", [1, 7])
def test_scores_of_parts_are_those_of_all_rows(world: World, n_rows: int) -> None:
    rows = world.examples(n_rows=n_rows)
    how = {"batch_size": 2, "pad_token_id": 0}
    alone = score(world.adapter, world.vector(), rows, **how)
    parts, told = [], list[int]()
    for rank in range(N_RANKS):
        share = Noted(rank, N_RANKS)
        score(world.adapter, world.vector(), rows, **how, share=share, on_rows=told.append)
        parts.append(share.parts[0])
    nll, right, _ = sum(parts).tolist()
    assert nll == pytest.approx(alone.nll, rel=1e-6)
    assert tuple(right) == alone.right
    assert told == [n_rows] * N_RANKS  # each rank knows when all rows are done
    assert sum(int((part[0] != 0).sum()) for part in parts) == n_rows

"""Scores against a forward pass by hand, and the paired error against what it estimates."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from pfl_lm.data.examples import Example
from pfl_lm.evaluate import RowScores, paired_difference, score
from tests.world import World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def by_hand(world: World, example: Example) -> float:
    """The summed nll of one row alone: no padding, no batch, no label tensor."""
    ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        predicted = world.backbone.model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
    positions = [i for first, last in example.spans for i in range(first, last)]
    return -math.fsum(float(predicted[i - 1, example.input_ids[i]]) for i in positions)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_each_row_gets_its_own_nll_in_its_own_place(world: World, batch_size: int) -> None:
    """Rows are scored longest first, in padded batches; the scores come in the rows' order."""
    examples = world.examples()
    lengths = [len(example.input_ids) for example in examples]
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))
    told: list[int] = []

    found = score(
        world.adapter,
        world.vector(),
        examples,
        batch_size=batch_size,
        pad_token_id=world.backbone.pad_token_id,
        on_rows=told.append,
    )

    assert torch.equal(world.adapter.read(), world.vector())
    wanted = [by_hand(world, example) for example in examples]
    assert found.tokens == tuple(example.n_supervised for example in examples)
    assert found.nll == pytest.approx(wanted, rel=1e-5)
    assert max(wanted) > 1.5 * min(wanted)
    # The mean weighs a row by its supervised tokens: it is no mean of the rows' means.
    assert found.mean == pytest.approx(sum(wanted) / sum(found.tokens), rel=1e-5)
    assert sum(told) == len(examples)
    assert max(told) <= batch_size


def test_a_row_scores_the_same_whatever_it_is_padded_with(world: World) -> None:
    found = [
        score(world.adapter, world.vector(), world.examples(), batch_size=8, pad_token_id=pad)
        for pad in (0, 7)
    ]
    assert found[0].nll == pytest.approx(found[1].nll, rel=1e-6)


def test_scoring_switches_dropout_off(world: World) -> None:
    world.adapter.model.train()
    score(world.adapter, world.start, world.examples(), batch_size=4, pad_token_id=0)
    assert not any(module.training for module in world.adapter.model.modules())


def test_no_rows_have_no_mean() -> None:
    assert math.isnan(RowScores((), ()).mean)
    assert RowScores((2.0, 4.0), (1, 3)).mean == 1.5


def test_with_equal_rows_the_error_is_the_textbooks() -> None:
    a, b = RowScores((5.0, 9.0, 4.0, 7.0), (2,) * 4), RowScores((4.0, 5.0, 6.0, 1.0), (2,) * 4)
    mean, error = paired_difference(a, b)
    differences = [0.5, 2.0, -1.0, 3.0]  # a token
    assert mean == pytest.approx(statistics.mean(differences))
    assert error == pytest.approx(statistics.stdev(differences) / math.sqrt(4))


def test_with_unequal_rows_the_error_is_the_bootstraps() -> None:
    """Rows are drawn with replacement, both scores of a row together."""
    rng = np.random.default_rng(0)
    n = 120
    tokens = rng.integers(1, 40, n)
    base = rng.normal(3.0, 0.8, n) * tokens  # rows differ far more than the two models do
    own = base - tokens * rng.normal(0.1, 0.05, n) + rng.normal(0, 1.0, n)

    mean, error = paired_difference(
        RowScores(tuple(own.tolist()), tuple(tokens.tolist())),
        RowScores(tuple(base.tolist()), tuple(tokens.tolist())),
    )

    draws = rng.integers(0, n, (4000, n))
    means = (own - base)[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    assert mean == pytest.approx((own - base).sum() / tokens.sum())
    assert error == pytest.approx(means.std(), rel=0.1)


def test_the_better_model_has_the_smaller_score() -> None:
    better, worse = RowScores((1.0, 2.0), (1, 1)), RowScores((2.0, 4.0), (1, 1))
    assert paired_difference(better, worse)[0] == -1.5
    assert paired_difference(worse, better)[0] == 1.5


def test_a_model_does_not_differ_from_itself() -> None:
    rows = RowScores((1.0, 2.5, 4.0), (1, 2, 3))
    assert paired_difference(rows, rows) == (0.0, 0.0)


def test_one_row_says_nothing_of_its_error() -> None:
    assert paired_difference(RowScores((3.0,), (2,)), RowScores((1.0,), (2,))) == (1.0, math.inf)


@pytest.mark.parametrize("tokens", [(3, 1), (2, 2, 2), (4,), ()])
def test_scores_of_other_rows_are_no_pair(tokens: tuple[int, ...]) -> None:
    other = RowScores((1.0,) * len(tokens), tokens)
    with pytest.raises(ValueError, match="the same rows"):
        paired_difference(RowScores((1.0, 1.0), (2, 2)), other)

"""Steps whose rows are drawn by a coin each: what is drawn, and how it is cut up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pfl_lm.data.examples import Example
from pfl_lm.data.poisson import poisson_steps

ROWS = tuple(Example((i, 1, 2), ((1, 3),)) for i in range(40))


def steps(**how: Any) -> list[list[list[int]]]:
    """Return the rows of every micro-batch of every step, by their first token."""
    known: dict[str, Any] = {"steps": 5, "rate": 0.25, "batch_size": 4, "pad_token_id": 0}
    loader = poisson_steps(ROWS, **{**known, "seed": 1, **how})
    return [
        [batch["input_ids"][:, 0].tolist() for batch in step["micro_batches"]] for step in loader
    ]


def test_every_row_comes_as_often_as_the_rate_says() -> None:
    found = steps(steps=4000, rate=0.1)
    counts = torch.zeros(40)
    sizes = []
    for step in found:
        rows = [row for batch in step for row in batch]
        assert len(set(rows)) == len(rows)
        counts[rows] += 1
        sizes.append(len(rows))
    spread = (4000 * 0.1 * 0.9) ** 0.5
    assert float((counts - 400).abs().max()) < 4.5 * spread
    number = torch.tensor(sizes, dtype=torch.float64)  # binomial: each row by itself
    assert float(number.mean()) == pytest.approx(4.0, abs=4 * (3.6 / 4000) ** 0.5)
    assert float(number.var()) == pytest.approx(3.6, rel=0.1)
    assert 0 in sizes
    assert max(sizes) > 8


def test_a_step_is_cut_into_micro_batches_of_the_usual_size() -> None:
    for step in steps(steps=50):
        assert all(len(batch) == 4 for batch in step[:-1])
        assert all(1 <= len(batch) <= 4 for batch in step)
    whole = [[row for batch in step for row in batch] for step in steps(batch_size=40)]
    assert [[row for batch in step for row in batch] for step in steps(batch_size=3)] == whole


def test_an_empty_step_has_no_micro_batch() -> None:
    assert [] in steps(steps=50, rate=0.01)


def test_rate_1_takes_every_row() -> None:
    assert steps(steps=2, rate=1.0, batch_size=64) == [[list(range(40))]] * 2


def test_the_draw_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = steps()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert steps() == first
    assert steps(seed=2) != first


def test_each_iteration_repeats_it() -> None:
    loader = poisson_steps(ROWS, steps=3, rate=0.5, batch_size=8, pad_token_id=0, seed=1)
    one, other = ([len(step["micro_batches"]) for step in loader] for _ in range(2))
    assert one == other
    assert len(loader) == 3


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": 1.1}, {"steps": 0}, {"batch_size": 0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least 1 and rate in \(0, 1\]"):
        steps(**wrong)


def test_a_client_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        poisson_steps([], steps=1, rate=0.5, batch_size=1, pad_token_id=0, seed=1)

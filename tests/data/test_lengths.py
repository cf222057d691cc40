"""Which rows share a micro-batch: those of like length, and the same rows in every step."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.data.batches import training_batches
from pfl_lm.data.examples import Example
from pfl_lm.data.poisson import poisson_steps
from pfl_lm.train.loss import nll_sum
from tests.interruptions import go_on, stopped, whole
from tests.same import check_same, facts_in
from tests.world import World, make_world

ROWS = [Example((100 + i, *range(1 + i * 7 % 23)), ((1, 2),)) for i in range(40)]
"""Told apart by their first token; their lengths come in no order."""


def rows_of(steps: int = 6, accumulation: int = 4, **how: Any) -> list[list[int]]:
    """Return the rows of each micro-batch."""
    known: dict[str, Any] = {"batch_size": 3, "pad_token_id": 0, "seed": 5, **how}
    batches = training_batches(ROWS, steps=steps, accumulation=accumulation, **known)
    return [[i - 100 for i in batch["input_ids"][:, 0].tolist()] for batch in batches]  # type: ignore[union-attr]


def lengths(rows: list[int]) -> list[int]:
    return [len(ROWS[i].input_ids) for i in rows]


def padded(batches: list[list[int]]) -> int:
    return sum(len(batch) * max(lengths(batch)) for batch in batches)


def windows(batches: list[list[int]], accumulation: int) -> list[list[int]]:
    """Return the rows of each step, in order of their micro-batches."""
    starts = range(0, len(batches), accumulation)
    return [list(chain(*batches[start : start + accumulation])) for start in starts]


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("accumulation", [2, 3, 5])
def test_a_window_goes_from_its_longest_row_to_its_shortest(accumulation: int, group: bool) -> None:
    """And has the rows, and the sizes of micro-batches, that it has without that."""
    how: dict[str, Any] = {"group_by_length": group}
    dealt = rows_of(7, accumulation, **how)
    plain = rows_of(7 * accumulation, 1, **how)  # the same passes, a window for each micro-batch
    assert [len(batch) for batch in dealt] == [len(batch) for batch in plain]
    assert group or set(map(len, plain)) == {3, 1}
    assert dealt != plain
    both = windows(dealt, accumulation), windows(plain, accumulation)
    for found, due in zip(*both, strict=True):
        assert Counter(found) == Counter(due)
        assert lengths(found) == sorted(lengths(due), reverse=True)
    assert padded(dealt) <= padded(plain)
    assert group or padded(dealt) < padded(plain)


def test_equally_long_rows_stay_in_their_order() -> None:
    alike = [Example((100 + i, 1, 2), ((1, 2),)) for i in range(9)]
    found = []
    for accumulation in (1, 3):
        batches = training_batches(
            alike, steps=3 // accumulation, accumulation=accumulation, batch_size=3,
            pad_token_id=0, seed=1,
        )  # fmt: skip
        found.append([batch["input_ids"][:, 0].tolist() for batch in batches])  # type: ignore[union-attr]
    assert found[0] == found[1]


def test_grouped_passes_see_every_row_once() -> None:
    found = rows_of(28, 1, group_by_length=True)
    passes = [found[:14], found[14:]]
    for one in passes:
        assert Counter(list(chain(*one))) == Counter(range(40))
        assert sorted(map(len, one)) == [1, *[3] * 13]
    assert passes[0] != passes[1]


def test_grouping_pads_less_and_follows_from_the_seed() -> None:
    plain, grouped = (rows_of(42, 1, group_by_length=group) for group in (False, True))
    real = sum(sum(lengths(batch)) for batch in plain)
    assert sum(sum(lengths(batch)) for batch in grouped) == real
    assert padded(plain) > 1.3 * real
    assert padded(grouped) < 1.15 * real
    assert rows_of(42, 1, group_by_length=True) == grouped
    assert rows_of(42, 1, group_by_length=True, seed=6) != grouped


def test_a_short_turn_sees_rows_of_all_lengths() -> None:
    """Longest first through the pass, a turn of two steps would never see a short row."""
    met = Counter[int]()
    for seed in range(200):
        met.update(list(chain(*rows_of(2, 1, group_by_length=True, seed=seed))))
    assert set(met) == set(range(40))
    assert max(met.values()) < 4 * min(met.values())


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    *(st.integers(1, top) for top in (5, 4, 4)),
    st.booleans(),
)
def test_no_row_is_lost(row_lengths: list[int], steps: int, accumulation: int, size: int, group: bool) -> None:  # noqa: E501  # fmt: skip
    examples = [Example((100 + i, *range(n)), ((1, 2),)) for i, n in enumerate(row_lengths)]
    batches = training_batches(
        examples, steps=steps, accumulation=accumulation, batch_size=size, pad_token_id=0,
        seed=1, group_by_length=group,
    )  # fmt: skip
    seen = [batch["input_ids"][:, 0].tolist() for batch in batches]  # type: ignore[union-attr]
    assert len(seen) == steps * accumulation
    times = Counter(list(chain(*seen)))
    assert max(times.values()) - min(times[100 + i] for i in range(len(examples))) <= 2


@pytest.fixture(scope="module")
def world() -> World:
    made = make_world()
    made.adapter.write(made.vector())
    return made


@pytest.mark.parametrize("seed", [1, 2])
def test_a_windows_gradient_is_that_of_one_batch(world: World, seed: int) -> None:
    """However its rows are dealt out; by the sum of the losses and of their gradients."""
    rows = world.examples(n_rows=12)
    pad = world.backbone.pad_token_id
    found = []
    for size, accumulation in ((12, 1), (3, 4), (5, 3)):
        world.adapter.zero_grad()
        total = torch.zeros(())
        for batch in training_batches(
            rows, steps=1, accumulation=accumulation, batch_size=size, pad_token_id=pad, seed=seed
        ):
            loss = nll_sum(world.adapter.model, batch) / batch["window_tokens"]
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        found.append((total, world.adapter.grads.clone()))
    for loss, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
        assert (grads - found[0][1]).norm() < 1e-5 * grads.norm()


def test_a_private_step_is_cut_by_length_too() -> None:
    known: dict[str, Any] = {"steps": 9, "rate": 0.3, "pad_token_id": 0, "seed": 3}
    cut, whole = (
        [
            [
                [i - 100 for i in batch["input_ids"][:, 0].tolist()]
                for batch in step["micro_batches"]
            ]
            for step in poisson_steps(ROWS, batch_size=size, **known)
        ]
        for size in (4, 40)
    )
    assert max(map(len, cut)) > 2
    for parts, (drawn,) in zip(cut, whole, strict=True):
        together = list(chain(*parts))
        assert Counter(together) == Counter(drawn)
        assert lengths(together) == sorted(lengths(drawn), reverse=True)
        assert drawn == sorted(drawn)  # one micro-batch stays as it was


def test_a_run_that_groups_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    group: dict[str, Any] = {
        "data.group_by_length": True,
        "training.gradient_accumulation_steps": 2,
        "training.per_device_train_batch_size": 2,
    }
    wanted = whole(tmp_path / "whole", **group)
    folder = stopped(tmp_path / "stopped", 13, **group)
    go_on(folder)
    check_same(folder, wanted)
    without = whole(tmp_path / "without", **group | {"data.group_by_length": False})
    assert facts_in(without)["scores"] != facts_in(wanted)["scores"]

"""Ranks that share a turn: each row of each optimizer step is one rank's, and nobody else's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.data.batches import IGNORED, accumulation_of_rank, training_batches
from pfl_lm.data.examples import Example
from pfl_lm.data.poisson import poisson_steps


def marked(n: int) -> list[Example]:
    """Examples told apart by their first token, of unequal lengths and supervised counts."""
    return [Example((100 + i, *range(i % 5 + 3)), ((1, 2 + i % 3),)) for i in range(n)]


def rows_in(batches: list[dict[str, Any]]) -> Counter[int]:
    return Counter(i for b in batches if "input_ids" in b for i in b["input_ids"][:, 0].tolist())


def in_windows(batches: Any, size: int) -> list[list[dict[str, Any]]]:
    every = list(batches)
    assert len(every) % size == 0
    return [every[start : start + size] for start in range(0, len(every), size)]


@given(
    st.integers(1, 13),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
)
def test_every_row_of_every_step_is_on_one_rank(
    n_rows: int, batch_size: int, accumulation: int, n_ranks: int, by_length: bool
) -> None:
    steps = 4
    how: dict[str, Any] = {
        "steps": steps,
        "accumulation": accumulation,
        "batch_size": batch_size,
        "pad_token_id": 0,
        "seed": 3,
        "group_by_length": by_length,
    }
    examples = marked(n_rows)
    whole = in_windows(training_batches(examples, **how), accumulation)
    own = accumulation_of_rank(accumulation, n_ranks)
    shares = [
        in_windows(training_batches(examples, **how, rank=rank, n_ranks=n_ranks), own)
        for rank in range(n_ranks)
    ]
    assert [len(share) for share in shares] == [steps] * n_ranks
    for step, window in enumerate(whole):
        parts = [share[step] for share in shares]
        counts = [rows_in(part) for part in parts]
        assert sum(counts, Counter()) == rows_in(window)
        sizes = [part.total() for part in counts]
        assert max(sizes) - min(sizes) <= 1
        supervised = sum(int((batch["labels"] != IGNORED).sum()) for batch in window)
        tokens = {batch["window_tokens"] for part in (*parts, window) for batch in part}
        assert tokens == {supervised}  # of the whole step, on every rank
        assert max(len(b["labels"]) for part in parts for b in part if "labels" in b) <= batch_size


def test_a_step_of_ranks_is_as_short_as_it_can_be() -> None:
    assert [accumulation_of_rank(4, n) for n in (1, 2, 3, 4, 9)] == [4, 2, 2, 1, 1]


def test_a_batch_without_a_row_has_the_tokens_alone() -> None:
    loader = training_batches(
        marked(1),
        steps=1,
        accumulation=1,
        batch_size=2,
        pad_token_id=0,
        seed=0,
        rank=1,
        n_ranks=2,
    )
    assert list(loader) == [{"window_tokens": 1}]


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_rows_drawn_by_chance_are_dealt_out_too(n_ranks: int) -> None:
    how: dict[str, Any] = {
        "steps": 6,
        "rate": 0.5,
        "batch_size": 2,
        "pad_token_id": 0,
        "seed": 1,
    }
    examples = marked(9)
    whole = [rows_in(step["micro_batches"]) for step in poisson_steps(examples, **how)]
    shares = [
        [step["micro_batches"] for step in poisson_steps(examples, **how, rank=r, n_ranks=n_ranks)]
        for r in range(n_ranks)
    ]
    for step, drawn in enumerate(whole):
        parts = [rows_in(share[step]) for share in shares]
        assert sum(parts, Counter()) == drawn
        assert max(len(b["labels"]) for share in shares for b in share[step]) <= 2

"""Poisson sampling: each row takes part in each optimizer step by a coin of its own.

That is the sampling that differential privacy's amplification is proved for. A step then has as
many rows as it happens to have, perhaps none; they are cut into micro-batches of the usual size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pfl_lm.data.batches import collate, longest_first
from pfl_lm.data.examples import Example


def poisson_steps(
    examples: Sequence[Example],
    *,
    steps: int,
    rate: float,
    batch_size: int,
    pad_token_id: int,
    seed: int,
    rank: int = 0,
    n_ranks: int = 1,
) -> DataLoader[dict[str, list[dict[str, Tensor]]]]:
    """Draw the rows of ``steps`` optimizer steps, each row in each step with probability ``rate``.

    What is drawn depends on ``seed`` alone, and PyTorch's global generator is left as it was. Of
    several ranks each gets its share of every step's rows, dealt out by length.

    Returns:
        A loader of one step at a time: under ``micro_batches`` a list, perhaps empty, of what
        ``collate`` makes of at most ``batch_size`` rows.

    Raises:
        ValueError: there are no examples, steps or batch_size is below 1, or rate is not above 0
            and at most 1.
    """
    if not examples:
        raise ValueError("a client turn needs at least one example")
    if min(steps, batch_size) < 1 or not 0 < rate <= 1:
        raise ValueError(
            f"steps and batch_size must be at least 1 and rate in (0, 1], "
            f"got {steps}, {batch_size} and {rate}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand((steps, len(examples)), generator=generator, dtype=torch.float64) < rate
    rows = [step.nonzero().flatten().tolist() for step in drawn]
    if n_ranks > 1:
        lengths = [len(example.input_ids) for example in examples]
        rows = [longest_first(step, lengths)[rank::n_ranks] for step in rows]
    loaded = _Steps(examples, rows, batch_size, pad_token_id)
    # Iterating a DataLoader draws a number, which without a generator comes from the global one.
    return DataLoader(loaded, batch_size=None, shuffle=False, num_workers=0, generator=generator)


class _Steps(Dataset[dict[str, Any]]):
    """Steps by position, padded only when they are asked for."""

    def __init__(
        self,
        examples: Sequence[Example],
        rows: list[list[int]],
        batch_size: int,
        pad_token_id: int,
    ) -> None:
        self._examples = examples
        self._lengths = [len(example.input_ids) for example in examples]
        self._rows = rows
        self._batch_size = batch_size
        self._pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = self._rows[index]
        if len(rows) > self._batch_size:
            rows = longest_first(rows, self._lengths)
        chosen = [self._examples[i] for i in rows]
        starts = range(0, len(chosen), self._batch_size)
        batches = [chosen[start : start + self._batch_size] for start in starts]
        return {"micro_batches": [collate(batch, self._pad_token_id) for batch in batches]}

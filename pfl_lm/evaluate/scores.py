"""Scoring one model on one client's rows: token-weighted negative log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pfl_lm.data.batches import evaluation_batches, longest_first
from pfl_lm.layout import Vector
from pfl_lm.train.loss import guessed

if TYPE_CHECKING:
    from pfl_lm.data.examples import Example
    from pfl_lm.model.adapter import Adapter
    from pfl_lm.train.share import Share


@dataclass(frozen=True, slots=True)
class RowScores:
    """One model's losses on a client's rows, in the rows' own order.

    Attributes:
        nll: summed negative log-likelihood of each row's supervised tokens, nats.
        tokens: supervised tokens of each row.
        right: how many of them are the model's first guess.
        classes: the number of the class that is its first guess; empty where rows have none.
    """

    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    right: tuple[int, ...] = ()
    classes: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """Nats a supervised token, over all rows; NaN where there is none."""
        tokens = sum(self.tokens)
        return math.fsum(self.nll) / tokens if tokens else math.nan


@torch.no_grad()
def score(
    adapter: Adapter,
    vector: Vector,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_token_id: int,
    on_rows: Callable[[int], None] | None = None,
    share: Share | None = None,
) -> RowScores:
    """Score ``vector`` on a client's rows. Overwrites the resident adapter.

    ``on_rows`` is told how many rows each batch had, for progress. With a ``share`` this rank runs
    its part of the rows, dealt out by length, and every rank gets the scores of all.
    """
    adapter.write(vector)
    adapter.model.eval()
    mine = list(range(len(examples)))
    if share is not None:
        mine = longest_first(mine, [len(example.input_ids) for example in examples])
        mine = mine[share.rank :: share.n_ranks]
    found = torch.zeros(3, len(examples), dtype=torch.float64)  # nll, right, class
    for indices, batch in evaluation_batches([examples[i] for i in mine], batch_size, pad_token_id):
        placed = {name: tensor.to(vector.device) for name, tensor in batch.items()}
        guess = guessed(adapter.forward, placed)
        numbers = [guess.nll, guess.right, *([] if guess.classes is None else [guess.classes])]
        of_batch = torch.stack([each.float() for each in numbers]).cpu().double()
        found[: len(numbers), [mine[i] for i in indices]] = of_batch
        if on_rows is not None and share is None:
            on_rows(len(indices))
    if share is not None:
        found = found.to(vector.device)
        share.add_up(found)
        if on_rows is not None:
            on_rows(len(examples))
    nll, right, classes = found.tolist()
    classified = any(example.label is not None for example in examples)
    return RowScores(
        nll=tuple(nll),
        tokens=tuple(example.n_supervised for example in examples),
        right=tuple(map(int, right)),
        classes=tuple(map(int, classes)) if classified else (),
    )


def paired_difference(a: RowScores, b: RowScores) -> tuple[float, float]:
    """Return (mean, standard error) of a - b in nats a token, over the same rows.

    The mean is a ratio of sums (rows weigh by their tokens), so its error is that of a ratio
    estimator: residuals d_j - mean · t_j. One row alone says nothing of its error: infinite.

    Raises:
        ValueError: the two were not scored on the same rows.
    """
    if a.tokens != b.tokens:
        raise ValueError("paired scores need the same rows")
    n, tokens = len(a.tokens), sum(a.tokens)
    differences = [x - y for x, y in zip(a.nll, b.nll, strict=True)]
    mean = math.fsum(differences) / tokens
    if n < 2:
        return mean, math.inf
    residuals = (d - mean * t for d, t in zip(differences, a.tokens, strict=True))
    return mean, math.sqrt(n / (n - 1) * math.fsum(r * r for r in residuals)) / tokens

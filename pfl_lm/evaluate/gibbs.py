"""How often a model is wrong about the tokens of its rows; and the same with noise on its weights.

The loss of a row is the share of its supervised tokens that are not the model's first guess: a
number in [0, 1], and each row counts alike, whatever its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from pfl_lm.data.batches import collate, evaluation_batches
from pfl_lm.layout import Vector
from pfl_lm.train.loss import error_by_row

if TYPE_CHECKING:
    from pfl_lm.data.examples import Example
    from pfl_lm.model.adapter import Adapter


@torch.no_grad()
def token_error(
    adapter: Adapter,
    vector: Vector,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_token_id: int,
) -> float:
    """Return the mean error of ``vector`` over rows. Overwrites the resident adapter."""
    adapter.write(vector)
    adapter.model.eval()
    errors: list[float] = []
    for _, batch in evaluation_batches(examples, batch_size, pad_token_id):
        placed = {name: tensor.to(vector.device) for name, tensor in batch.items()}
        errors += error_by_row(adapter.forward, placed).tolist()
    return math.fsum(errors) / len(errors)


@torch.no_grad()
def noisy_token_error(
    adapter: Adapter,
    vector: Vector,
    examples: Sequence[Example],
    *,
    sigma: float,
    samples: int,
    pad_token_id: int,
    seed: int,
    on_rows: Callable[[int], None] | None = None,
) -> float:
    """Return the mean error over rows of adapters drawn from N(``vector``, σ² I).

    Every row meets ``samples`` adapters, and none is used twice: the mean is over
    ``samples * len(examples)`` independent draws. Overwrites the resident adapter.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter.model.eval()
    errors: list[float] = []
    for example in examples:
        batch = collate([example], pad_token_id)
        placed = {name: tensor.to(vector.device) for name, tensor in batch.items()}
        for _ in range(samples):
            noise = torch.randn(vector.shape, generator=generator).to(vector.device)
            adapter.write(torch.add(vector, noise, alpha=sigma))
            errors += error_by_row(adapter.forward, placed).tolist()
        if on_rows is not None:
            on_rows(1)
    return math.fsum(errors) / len(errors)

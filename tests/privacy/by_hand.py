"""DP-SGD by hand: one row at a time through a model of its own, in float64 where it is summed.

Takes nothing of pfl-lm's but the rows themselves and the order of its random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pfl_lm.data.batches import collate
from pfl_lm.data.examples import Example
from pfl_lm.layout import Vector
from pfl_lm.seeds import derive_seed
from tests.parity.plain import PlainClient
from tests.tiny import tiny_model


def gradient_of(client: PlainClient, row: Example) -> Vector:
    """Return the gradient of one row's mean token loss, the row alone in its batch."""
    batch = {**collate([row], 0), "window_tokens": row.n_supervised}
    return client.gradient(batch)


def private_gradient(
    gradients: Iterable[Vector], noise: Tensor, *, clip: float, sigma: float, expected: float
) -> Tensor:
    """Return (Σ g min(1, C/‖g‖) + σ C z) / (q n), in float64."""
    total = torch.zeros_like(noise, dtype=torch.float64)
    for gradient in gradients:
        exact = gradient.double()
        norm = float(exact.norm())
        total += exact * min(1.0, clip / norm)
    return (total + sigma * clip * noise.double()) / expected


def drawn(seed: int, steps: int, n_rows: int, rate: float) -> list[list[int]]:
    """Return each step's rows: row i of step t is in if its coin falls below the rate."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "rows", 0))
    coins = torch.rand((steps, n_rows), generator=generator, dtype=torch.float64).tolist()
    return [[i for i, coin in enumerate(step) if coin < rate] for step in coins]


def sgd_fit(
    start: Vector,
    rows: Sequence[Example],
    *,
    seed: int,
    steps: int,
    rate: float,
    lr: float,
    clip: float,
    sigma: float,
    dropout: float = 0.0,
) -> Vector:
    """Return where DP-SGD leads from ``start`` with plain SGD as its optimizer."""
    client = PlainClient(tiny_model(), start, dropout=dropout)
    noise = torch.Generator().manual_seed(derive_seed(seed, "noise", 0))
    w = start.double()
    for chosen in drawn(seed, steps, len(rows), rate):
        client.w = w.float()
        gradients = [gradient_of(client, rows[i]) for i in chosen]
        z = torch.randn(len(start), generator=noise)
        w = w - lr * private_gradient(
            gradients, z, clip=clip, sigma=sigma, expected=rate * len(rows)
        )
    return w

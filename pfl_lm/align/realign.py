"""Where a client starts, what it keeps, and how much of it one step gives back.

The second mechanism of pFLAlign (Kim & Lee, arXiv 2605.02143, Algorithm 1):

    w ← w_g + Δ            the realigned start of a round
    w ← w - (1/T) γ ⊙ Δ    the share of the correction due at each of the T optimizer steps
    Δ ← w - w_g            the offset after the round, from the w_g this round started from

Not of the paper: a client that was away may find its offset as much smaller as if it had gone on
taking the same share Γ, the mean of γ over its last turn, off it in each of the k rounds missed:

    Δ ← Δ ⊙ (1-Γ)^k

All vectors have shape ``(d,)``. Δ is formed in fp32 before anything is cast for transport: at
lower precision most of a round's correction would be rounded away.
"""

from __future__ import annotations

import torch
from torch import Tensor


def realigned_start(global_weights: Tensor, offset: Tensor) -> Tensor:
    """Return ``w_g + Δ``, a new vector."""
    return global_weights + offset


def offset_after_round(weights: Tensor, global_weights: Tensor) -> Tensor:
    """Return ``w - w_g`` in fp32 (or better), a new vector."""
    wide = torch.promote_types(weights.dtype, torch.float32)
    return weights.to(wide) - global_weights.to(wide)


def decayed_offset(offset: Tensor, correction: Tensor, missed: int) -> Tensor:
    """Return ``Δ ⊙ (1-Γ)^k`` for Γ ``correction`` and k ``missed`` rounds; Δ itself if k is 0.

    Raises:
        ValueError: ``missed`` is negative.
    """
    if missed < 0:
        raise ValueError(f"missed: a number of rounds is not negative, got {missed}")
    return offset if missed == 0 else offset * (1 - correction) ** missed


def correction_share(gamma: Tensor, offset: Tensor, steps: int) -> Tensor:
    """Return ``(1/T) γ ⊙ Δ``, what one of T optimizer steps takes off the weights.

    Raises:
        ValueError: ``steps`` is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps: a round has at least one optimizer step, got {steps}")
    return gamma * offset / steps

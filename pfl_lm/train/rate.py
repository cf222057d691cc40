"""``learning_rate: auto``: a first guess from the gradients themselves, for pFLAlign as published.

The preconditioner shrinks a step to a few percent, and by how much depends on the data and on T. So
T gradients are taken at the untouched start, moving nothing, and the rate is set such that the
first-order decrease they promise is a fixed share of the loss:

    η = τ L₀ / Σ_t ⟨g_t, P_t ⊙ g_t⟩        L₀: mean loss at the start; P_t from align/moments.py

Scaling the loss scales L₀ and g alike, hence η by its inverse: the trajectory stays the same. All
T steps are needed: P is exactly (1-β)² at the first and three to five times that soon after.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import torch

from pfl_lm.align import AlignmentState, alignment_step
from pfl_lm.layout import Vector
from pfl_lm.train.local import LocalTrainer

TAU = 0.01
"""τ, the share of the loss that a round's first-order decrease is set to: on the careful side."""

PROBED_CLIENTS = 3
"""How many clients are asked for a rate; the median counts."""


class RateTooHighError(Exception):
    """A client's loss on its own training batches rose over the first round."""


def suggested_rate(run: LocalTrainer, start: Vector, *, beta: float, eps: float) -> float:
    """Return the rate that one client's gradients at ``start`` suggest; NaN if they are all zero.

    Overwrites the resident adapter, trains nothing.
    """
    state = AlignmentState.zeros(start.numel(), device=start.device)
    no_offset = torch.zeros_like(start)
    losses, decrease = [], 0.0
    for window in run.windows(run.steps):
        parts = [run.loss_and_grad(start, batch) for batch in window]
        grad = torch.stack([grad for _, grad in parts]).sum(dim=0)
        losses.append(math.fsum(loss for loss, _ in parts))
        step = alignment_step(state, grad, no_offset, beta=beta, eps=eps)
        decrease += float((grad * step.preconditioner * grad).sum(dtype=torch.float64))
    return TAU * statistics.fmean(losses) / decrease if decrease > 0 else math.nan


def median_rate(rates: Iterable[float]) -> float | None:
    """Return the median of the finite rates, to two digits; None if there is none."""
    finite = [rate for rate in rates if math.isfinite(rate)]
    return float(f"{statistics.median(finite):.2g}") if finite else None

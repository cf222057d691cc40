"""What a method adds to the gradient of every optimizer step, as Lightning callbacks.

    g ← g + μ (w - w_ref)      ProximalTerm: the gradient of (μ/2)‖w - w_ref‖²
    g ← g + s                  GradientShift: a constant vector

Both hook in where the window's gradient is whole and the optimizer has not seen it yet, once an
optimizer step; with AdamW the sum is what its moments are of. The losses that a turn reports are
those of the data alone. A factor that is not trained has no gradient to add to, and stays. A head
that is a client's own is not pulled anywhere: what is shared holds none for it.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer
from typing_extensions import override

from pfl_lm.layout import Vector


class ProximalTerm(L.Callback):
    """Pull the weights towards a reference: g ← g + μ (w - w_ref).

    Args:
        reference: w_ref, ``(d,)``; left alone.
        strength: μ ≥ 0; with 0 the gradient stays as it is, bit for bit.
    """

    def __init__(self, reference: Vector, strength: float) -> None:
        self.reference = reference
        self.strength = strength

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the pull to the gradients, in place."""
        adapter: Any = pl_module.adapter
        if not self.strength:
            return
        pull = adapter.weights - self.reference
        if pl_module.private_head:
            pull[adapter.layout.head] = 0.0
        adapter.grads.add_(pull, alpha=self.strength)


class GradientShift(L.Callback):
    """Add a constant to every gradient: g ← g + s.

    Args:
        shift: s, ``(d,)``; left alone.
    """

    def __init__(self, shift: Vector) -> None:
        self.shift = shift

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the shift to the gradients, in place."""
        adapter: Any = pl_module.adapter
        adapter.grads.add_(self.shift)

"""The private gradient of one optimizer step: clipped row by row, summed, noised (DP-SGD).

Abadi et al., "Deep Learning with Differential Privacy", arXiv 1607.00133, Algorithm 1:

    rows of the step   each of the client's n rows with probability q, by itself   data/poisson.py
    g̃  ←  1/(q n) ( Σ_i g_i min(1, C / ‖g_i‖)  +  σ C · N(0, 1)^d )

g_i is the gradient of row i's own loss over all that is trained, C ``max_grad_norm``, σ
``noise_multiplier``. One row changes the sum by C at most. The divisor is the number of rows
expected and not the number drawn, which is nobody's to know; a step that draws no row is noise
alone. Whatever is made of g̃ afterwards costs no privacy.

A row whose gradient is not finite counts as zero, since no clipping bounds it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pfl_lm.privacy.examples import take_rows, watched_rows
from pfl_lm.seeds import derive_seed

if TYPE_CHECKING:
    from pfl_lm.model.adapter import Adapter
    from pfl_lm.recipe import RecordLevelOptions

_TO_BE_SAFE = 1e-6
"""Added to a norm before it divides, as in Opacus."""


@dataclass(frozen=True, slots=True)
class RecordLevel:
    """The record-level lever as one client's turn gets it; ``seed`` is a secret of that turn."""

    options: RecordLevelOptions
    seed: int = field(repr=False)

    def sampling_seed(self, fit: int) -> int:
        """Return what a fit's rows are drawn by: known to an adversary, it would amplify nothing.

        ``fit`` counts the fits of a turn from 0; each has rows and noise of its own.
        """
        return derive_seed(self.seed, "rows", fit)

    def gradient(
        self, adapter: Adapter, fit: int, expected_rows: float, trained: Tensor | None = None
    ) -> PrivateGradient:
        """Return what one fit's gradients go through."""
        seed = derive_seed(self.seed, "noise", fit)
        return PrivateGradient(
            adapter, self.options, seed=seed, expected_rows=expected_rows, trained=trained
        )


class PrivateGradient:
    """Makes the private gradient of each optimizer step of one fit.

    Args:
        adapter: whose gradients; what can be trained is settled before `watching`.
        options: σ and C.
        seed: of the noise; a fit of its own must have one of its own.
        expected_rows: q n, the mean number of rows in a step.
        trained: ``(d,)``, true on the numbers that the client's own adapter has, if it is smaller
            than the resident one: no others get any noise, since no others are trained.

    Attributes:
        released: how many gradients have been given away.
        total: ``(d,)``, the sum of the step's clipped gradients so far. Where ranks share a step,
            it is to be that of all of them before it is released: the noise is then added once.
    """

    def __init__(
        self,
        adapter: Adapter,
        options: RecordLevelOptions,
        *,
        seed: int,
        expected_rows: float,
        trained: Tensor | None = None,
    ) -> None:
        self.adapter = adapter
        self.options = options
        self.expected_rows = expected_rows
        self.trained = None if trained is None else trained.to(adapter.grads.device)
        self.released = 0
        self.total = torch.zeros_like(adapter.grads)
        self._generator = torch.Generator().manual_seed(seed)

    def watching(self) -> AbstractContextManager[None]:
        """Return the context in which rows' gradients are kept apart."""
        return watched_rows(self.adapter)

    def add(self, losses: Tensor) -> None:
        """Take in the rows of one micro-batch by their losses, ``(rows,)``, in `watching`.

        Goes backward, which adds to the adapter's gradients; they are the caller's to clear.
        """
        torch.autograd.backward(losses.sum())
        rows = take_rows(self.adapter, len(losses))
        if not rows:
            return
        norms = torch.stack([g.flatten(1).norm(dim=1) for _, g in rows]).norm(dim=0)
        sound = norms.isfinite()
        factors = (self.options.max_grad_norm / (norms[sound] + _TO_BE_SAFE)).clamp(max=1.0)
        for entry, g in rows:
            clipped = torch.einsum("i,i...->...", factors, g[sound])
            self.total[entry.start : entry.stop] += clipped.flatten()

    def release(self) -> None:
        """Put the step's private gradient in the place of the adapter's, and begin the next."""
        noise = torch.randn(len(self.total), generator=self._generator)
        std = self.options.noise_multiplier * self.options.max_grad_norm
        self.total.add_(noise.to(self.total.device), alpha=std).div_(self.expected_rows)
        for (_, view), parameter in zip(
            self.adapter.layout.views(self.total), self.adapter.parameters(), strict=True
        ):
            if not parameter.requires_grad:
                view.zero_()  # nobody trains it: no noise is due
        if self.trained is not None:
            self.total.masked_fill_(~self.trained, 0.0)
        self.adapter.grads.copy_(self.total)
        self.total.zero_()
        self.released += 1

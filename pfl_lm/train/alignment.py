"""pFLAlign inside a Lightning fit: one shared turn, two callbacks.

    on_before_optimizer_step   g → m, v, P, γ (once);  g ← P ⊙ g          GradientPreconditioner
    optimizer.step             w ← w - η g
    on_train_batch_end         w ← w_before + P ⊙ (w - w_before)          GradientPreconditioner
                               (only with ``precondition_target: update``)
                               w ← w - (1/T) γ ⊙ Δ                        AggregationRealignment

Lightning calls ``on_before_optimizer_step`` once per optimizer step, after accumulation, after the
reduction over ranks and after unscaling, and before clipping: the gradient the moments must see.

A gradient that is not finite moves nothing. Whether one is, is found out on the device and not
asked for by the host, which on a GPU would wait for all that was queued: moments and γ are chosen
by it, and a gradient of zero takes no step of SGD. AdamW, whose own moments would move, is told.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch.optim import SGD, Optimizer
from typing_extensions import override

from pfl_lm.align import (
    AlignmentState,
    AlignmentStep,
    Correction,
    alignment_step,
    correction_share,
)
from pfl_lm.layout import AdapterLayout, Vector

Target = Literal["gradient", "update"]
Scale = Literal["none", "per_matrix", "match"]


class AlignmentTurn:
    """One client's moments and offset during one turn of T optimizer steps.

    Args:
        state: the client's moments; its first moment is reset here, and all are updated in place.
        offset: Δ, ``(d,)``, fixed during the turn.
        steps: T, the planned optimizer steps.
        beta: decay of the moments.
        eps: the paper's ε.
        correction: how γ is read off the moments.

    Attributes:
        current: P and γ of the step in progress; None between steps. Of a step that is left out, γ
            is 0.
    """

    def __init__(
        self,
        state: AlignmentState,
        offset: Vector,
        steps: int,
        *,
        beta: float = 0.9,
        eps: float = 0.0,
        correction: Correction = "erf",
    ) -> None:
        state.start_round()
        self.state = state
        self.offset = offset
        self.steps = steps
        self.beta = beta
        self.eps = eps
        self.correction: Correction = correction
        self.current: AlignmentStep | None = None
        self._left_out = torch.zeros((), dtype=torch.bool, device=offset.device)
        self._seen = 0
        self._skipped = torch.zeros((), dtype=torch.int64, device=offset.device)
        self._gamma_sum = torch.zeros_like(offset)

    def observe(self, grad: Vector) -> AlignmentStep:
        """Take the gradient of one optimizer step. If it is not finite it becomes zero, in place.

        No moment moves then. The host does not learn which it was.
        """
        self._left_out = ~grad.isfinite().all()
        state = self.state
        moments = (state.first_moment, state.second_moment, state.preconditioner)
        before = [moment.clone() for moment in moments]
        step = alignment_step(
            state,
            grad,
            self.offset,
            beta=self.beta,
            eps=self.eps,
            correction=self.correction,
        )
        for moment, kept in zip(moments, before, strict=True):
            torch.where(self._left_out, kept, moment, out=moment)
        grad.masked_fill_(self._left_out, 0.0)
        self.current = step._replace(gamma=step.gamma.masked_fill_(self._left_out, 0.0))
        self._seen += 1
        self._skipped += self._left_out
        self._gamma_sum += self.current.gamma
        return self.current

    def is_left_out(self) -> bool:
        """Return whether the step in progress had a gradient that was not finite; waits for it."""
        return bool(self._left_out)

    @property
    def skipped(self) -> int:
        """Optimizer steps left out because a gradient was not finite; waits for all of them."""
        return int(self._skipped)

    def correction_taken(self) -> Vector:
        """Return Γ, the share of Δ that this turn has taken off: γ summed over its steps, by T."""
        return self._gamma_sum / self.steps

    def summary(self) -> dict[str, float]:
        """Return what a reader of the run wants to know of this turn, as plain numbers."""
        skipped = self.skipped
        return {
            "preconditioner_mean": float(self.state.preconditioner.mean()),
            "gamma_mean": float(self._gamma_sum.mean() / max(self._seen - skipped, 1)),
            "correction_mean": float(self.correction_taken().mean()),
            "offset_norm_before": float(self.offset.norm()),
            "skipped_steps": float(skipped),
        }


class GradientPreconditioner(L.Callback):
    """pFLAlign's first mechanism: the multiplicative preconditioner on adapter gradients.

    It feeds the turn's moments even with ``enabled=False``, because γ needs them; the gradient is
    then left as it is, bit for bit.

    Args:
        turn: the moments of this client's turn.
        layout: where the LoRA matrices lie, for a scale per matrix.
        learning_rate: η; with ``per_matrix`` on the update, a matrix's step has this size.
        enabled: False for P ≡ 1.
        target: ``gradient`` scales g before the optimizer; ``update`` scales the step it took.
        scale: ``none``; ``per_matrix`` for root mean square 1 within each LoRA matrix; ``match``
            for that of the base optimizer's own gradient or update.
    """

    def __init__(
        self,
        turn: AlignmentTurn,
        layout: AdapterLayout,
        learning_rate: float,
        *,
        enabled: bool = True,
        target: Target = "gradient",
        scale: Scale = "none",
    ) -> None:
        self.turn = turn
        self.layout = layout
        self.learning_rate = learning_rate
        self.enabled = enabled
        self.target = target
        self.scale = scale
        self._before: Vector | None = None

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Forget the step before: a micro-batch that ends no window takes none."""
        self.turn.current = None

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Feed the moments; mutate the gradients in place: to zero if they are not finite."""
        adapter: Any = pl_module.adapter
        self.turn.observe(adapter.grads)
        if not isinstance(optimizer, SGD) and self.turn.is_left_out():
            adapter.drop_grad()
        if self.target == "update" and (self.enabled or self.scale != "none"):
            self._before = adapter.read()
        elif self.target == "gradient":
            self._precondition(adapter.grads, unit=1.0)

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """With ``target="update"``: scale the step the optimizer took, in the weights in place."""
        if self.turn.current is None or self._before is None:
            return
        adapter: Any = pl_module.adapter
        update = adapter.weights - self._before
        self._precondition(update, unit=self.learning_rate)
        torch.add(self._before, update, out=adapter.weights)
        self._before = None

    def _precondition(self, direction: Vector, unit: float) -> None:
        """Multiply a direction by P in place, then give each matrix its root mean square."""
        assert self.turn.current is not None
        wanted = self.layout.matrix_rms(direction) if self.scale == "match" else None
        if self.enabled:
            direction.mul_(self.turn.current.preconditioner)
        if self.scale == "none":
            return
        rms = self.layout.matrix_rms(direction)
        factor = (unit if wanted is None else wanted) / rms
        direction.mul_(factor.masked_fill_(rms == 0, 0.0))


class AggregationRealignment(L.Callback):
    """pFLAlign's second mechanism: after each optimizer step, w ← w - (1/T) γ ⊙ Δ.

    List it after the preconditioner, which settles the step first.
    """

    def __init__(self, turn: AlignmentTurn) -> None:
        self.turn = turn

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Take this step's share of the correction off the weights, in place."""
        if self.turn.current is not None:
            adapter: Any = pl_module.adapter
            share = correction_share(self.turn.current.gamma, self.turn.offset, self.turn.steps)
            adapter.weights.sub_(share)

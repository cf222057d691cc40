"""What happens to gradients and weights within one turn, layer by layer. It changes nothing.

Over the T optimizer steps of a fit, for the whole adapter and for each transformer layer L of it:

    preconditioner_mean   mean over steps and over L of P
    gamma_mean            mean over steps and over L of γ
    gamma_std             mean over steps of the standard deviation of γ over L
    offset_norm           ‖Δ_L‖ of the offset that the turn began with
    gradient_variance     mean over L of Σ_t (g_t - ḡ)² / (T - 1)
    update_variance       the same of u, only with ``precondition_target: update``
    step_variance         the same of what really steps
    cosine                of w_end - w_start and Δ, on L
    drift                 ‖w_end - w_g‖ on L

g is the gradient of one optimizer step before anything is added to it or multiplied with it. What
really steps is P ⊙ g, rescaled if the recipe says so; with ``precondition_target: update`` it is
P ⊙ u, where u is the optimizer's own step by the learning rate, (w_before - w_after) / η. The
weights move between steps, so that all three variances hold the noise of the batches and the change
of the gradient along the way. Variances are by B. P. Welford, "Note on a Method for Calculating
Corrected Sums of Squares and Products", Technometrics 4(3), 1962.

A step whose gradient is not finite does not count. What is not defined is left out: a cosine with a
zero vector, a variance over one step, P, γ and Δ of a method that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from pfl_lm.layout import AdapterLayout, Factor, Vector
from pfl_lm.quantities import REST, WHOLE, key, told
from pfl_lm.train.alignment import GradientPreconditioner


class TurnDiagnostics:
    """Looks on at the fits of one turn; of several, the last is told of.

    Args:
        layout: where the adapter's layers lie.
    """

    def __init__(self, layout: AdapterLayout) -> None:
        self.layout = layout
        self._fit: _Fit | None = None

    def around(self, start: Vector, callbacks: Sequence[L.Callback]) -> list[L.Callback]:
        """Return the callbacks of a fit from ``start`` with those that look on among them."""
        places = [i for i, c in enumerate(callbacks) if isinstance(c, GradientPreconditioner)]
        if not places:
            self._fit = _Fit(self.layout, start, None)
            return [_Before(self._fit), *callbacks]
        place = places[0]
        preconditioner: Any = callbacks[place]
        self._fit = _Fit(self.layout, start, preconditioner)
        after = _After(self._fit, preconditioner)
        return [_Before(self._fit), *callbacks[: place + 1], after, *callbacks[place + 1 :]]

    def ended(self, end: Vector) -> None:
        """Take the weights, ``(d,)``, at which the fit has ended."""
        assert self._fit is not None
        self._fit.end = end

    def summary(self, sent: Mapping[str, Vector]) -> dict[str, float]:
        """Return the turn's numbers by name; ``sent`` are the vectors of the broadcast."""
        fit = self._fit
        if fit is None or fit.end is None:
            return {}
        found = {
            key(quantity, layer): value
            for quantity, values in fit.quantities(_shared(self.layout, fit.end, sent)).items()
            for layer, value in zip(fit.names, values.tolist(), strict=True)
        }
        return {key(quantity, layer): value for layer, quantity, value in told(found)}


class _Fit:
    """One fit as it was seen; ``names`` are its layers, the whole adapter first."""

    def __init__(
        self, layout: AdapterLayout, start: Vector, preconditioner: GradientPreconditioner | None
    ) -> None:
        self.start = start
        self.end: Vector | None = None
        self.before: Vector | None = None
        self.sound = True
        self.preconditioner = preconditioner
        self.gradient, self.update, self.step = _Spread(), _Spread(), _Spread()
        self.names = [WHOLE, *(REST if n is None else str(n) for n in layout.layers)]
        self._slices = [(slice(0, layout.d),), *layout.layers.values()]
        self._p_mean: list[Tensor] = []
        self._gamma_mean: list[Tensor] = []
        self._gamma_std: list[Tensor] = []

    def takes(self, preconditioner: Vector, gamma: Vector) -> None:
        """Take P and γ of one step."""
        self._p_mean.append(self._by_layer(preconditioner, torch.mean))
        self._gamma_mean.append(self._by_layer(gamma, torch.mean))
        self._gamma_std.append(self._by_layer(gamma, lambda part: part.std(correction=0)))

    def quantities(self, shared: Vector | None) -> dict[str, Tensor]:
        """Return every quantity that there is; each of shape ``(len(names),)``."""
        spreads = {"gradient": self.gradient, "update": self.update, "step": self.step}
        found = {
            f"{name}_variance": self._by_layer(variance, torch.mean)
            for name, spread in spreads.items()
            if (variance := spread.variance()) is not None
        }
        seen = {
            "preconditioner_mean": self._p_mean,
            "gamma_mean": self._gamma_mean,
            "gamma_std": self._gamma_std,
        }
        found |= {name: torch.stack(steps).mean(dim=0) for name, steps in seen.items() if steps}
        assert self.end is not None
        if self.preconditioner is not None:
            moved, offset = self.end - self.start, self.preconditioner.turn.offset
            norm = self._norms(offset)
            found["offset_norm"] = norm
            dot = self._by_layer(moved.double() * offset.double(), torch.sum)
            found["cosine"] = dot / (self._norms(moved) * norm)  # 0/0 is left out
        if shared is not None:
            found["drift"] = self._norms(self.end - shared)
        return found

    def _norms(self, vector: Vector) -> Tensor:
        return self._by_layer(vector.double().square(), torch.sum).sqrt()

    def _by_layer(self, vector: Vector, what: Callable[[Tensor], Tensor]) -> Tensor:
        """Return one number of the whole vector, and of the part of each layer."""
        parts = (torch.cat([vector[piece] for piece in pieces]) for pieces in self._slices)
        return torch.stack([what(part) for part in parts])


class _Before(L.Callback):
    """Sees each gradient before anything changes it, and what the optimizer made of it."""

    def __init__(self, fit: _Fit) -> None:
        self.fit = fit

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the gradient of this step; and note where it starts, if P is for the update."""
        adapter: Any = pl_module.adapter
        self.fit.sound = bool(adapter.grads.isfinite().all())
        if self.fit.sound:
            self.fit.gradient.add(adapter.grads)
            preconditioner = self.fit.preconditioner
            if preconditioner is not None and preconditioner.target == "update":
                self.fit.before = adapter.read()

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Look at the optimizer's own step, before P changes it."""
        if self.fit.before is not None and self.fit.preconditioner is not None:
            adapter: Any = pl_module.adapter
            rate = self.fit.preconditioner.learning_rate
            self.fit.update.add((self.fit.before - adapter.weights) / rate)


class _After(L.Callback):
    """Stands behind the preconditioner: sees what P has made of a step, before the correction."""

    def __init__(self, fit: _Fit, preconditioner: GradientPreconditioner) -> None:
        self.fit = fit
        self.preconditioner = preconditioner

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at P, γ and, if P is for the gradient, at what it has become."""
        current = self.preconditioner.turn.current
        if current is None or not self.fit.sound:
            return
        self.fit.takes(current.preconditioner, current.gamma)
        if self.preconditioner.target == "gradient":
            adapter: Any = pl_module.adapter
            self.fit.step.add(adapter.grads)

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Look at what the update has become, if P is for it."""
        if self.fit.before is not None:
            adapter: Any = pl_module.adapter
            rate = self.preconditioner.learning_rate
            self.fit.step.add((self.fit.before - adapter.weights) / rate)
            self.fit.before = None


class _Spread:
    """The running mean of vectors and their summed squared deviations from it (Welford)."""

    def __init__(self) -> None:
        self._n = 0
        self._mean: Vector | None = None
        self._squares: Vector | None = None

    def add(self, vector: Vector) -> None:
        """Take one vector, ``(d,)``; it is left alone."""
        self._n += 1
        if self._mean is None or self._squares is None:
            self._mean, self._squares = vector.clone(), torch.zeros_like(vector)
            return
        away = vector - self._mean
        self._mean.add_(away, alpha=1 / self._n)
        self._squares.addcmul_(away, vector - self._mean)

    def variance(self) -> Vector | None:
        """Return the unbiased variance of each coordinate; None of fewer than two vectors."""
        if self._squares is None or self._n < 2:
            return None
        return self._squares.clamp(min=0) / (self._n - 1)


def _shared(layout: AdapterLayout, own: Vector, sent: Mapping[str, Vector]) -> Vector | None:
    """Return w_g as it was sent; a factor that is not shared is the client's own."""
    if "global_weights" in sent:
        return sent["global_weights"]
    factors: tuple[Factor, ...] = ("A", "B")
    there = [factor for factor in factors if f"global_{factor}" in sent]
    for factor in there:
        own = layout.with_factor(own, factor, sent[f"global_{factor}"])
    return own if there else None

"""The running moments behind pFLAlign: m, v, the preconditioner P and the alignment probability γ.

One optimizer step of one client (Kim & Lee, "Personalized Federated Learning for Gradient
Alignment", arXiv 2605.02143, Algorithm 1), coordinate by coordinate:

    m ← β m + (1-β) g                            first moment, 0 at the start of every round
    v ← β v + (1-β) g²                           second moment, kept between rounds
    P ← ((β v_prev + ε) P + (1-β) m²) / (v + ε)  multiplicative preconditioner, kept between rounds
    σ² ← max(v - m², 0)
    z ← |m| / sqrt(2 σ² + ε)
    γ ← ½ - ½ erf(z) sign(-m ⊙ Δ)                probability that the descent direction opposes Δ

The third line is the paper's ``α P + (1-β) m²/(v+ε)`` with ``α = 1 - (1-β) g²/(v+ε)``, written so
that it is exact for every ε and free of the gradient's scale at ε = 0: P is then EMA(m²)/v, a gate
on the signal-to-noise ratio. Where nothing was ever seen (0/0) P is 0; z is 0 where m is 0, and
infinite where only σ² is 0.

Symbols: g ``grad`` · m ``first_moment`` · v ``second_moment`` · P ``preconditioner`` ·
Δ ``offset`` · γ ``gamma`` · β ``beta`` · ε ``eps``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Correction = Literal["erf", "none", "half", "full", "hard"]
"""How γ is read off the moments: ``erf`` is the paper's; the others are its ablations."""


@dataclass(slots=True)
class AlignmentState:
    """What one client remembers of its gradients; every tensor has shape ``(d,)``.

    ``second_moment`` and ``preconditioner`` outlive a round; ``first_moment`` does not.
    """

    first_moment: Tensor
    second_moment: Tensor
    preconditioner: Tensor

    @classmethod
    def zeros(
        cls,
        d: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> AlignmentState:
        """Return the state of a client that has seen no gradient yet."""
        m, v, p = (torch.zeros(d, dtype=dtype, device=device) for _ in range(3))
        return cls(first_moment=m, second_moment=v, preconditioner=p)

    def start_round(self) -> None:
        """Forget the first moment, in place: each round's direction is its own."""
        self.first_moment.zero_()


class AlignmentStep(NamedTuple):
    """What one step of the recursion yields; both of shape ``(d,)``.

    ``preconditioner`` is the state's own tensor, valid until the next step.
    """

    preconditioner: Tensor
    gamma: Tensor


@torch.no_grad()
def alignment_step(
    state: AlignmentState,
    grad: Tensor,
    offset: Tensor,
    *,
    beta: float = 0.9,
    eps: float = 0.0,
    correction: Correction = "erf",
) -> AlignmentStep:
    """Take one gradient into the moments and read P and γ off them (Algorithm 1).

    Mutates ``state`` in place; ``grad`` and ``offset`` are left alone. All shapes are ``(d,)``.

    Raises:
        ValueError: the lengths differ, or ``correction`` has no such form.
    """
    m, v, p = state.first_moment, state.second_moment, state.preconditioner
    if grad.shape != m.shape or offset.shape != m.shape:
        raise ValueError(
            f"state, grad and offset must share one shape (d,): "
            f"{tuple(m.shape)}, {tuple(grad.shape)}, {tuple(offset.shape)}"
        )
    if correction not in get_args(Correction):
        raise ValueError(f"correction: {correction!r} is none of {', '.join(get_args(Correction))}")
    kept = v.mul_(beta) + eps  # β v_prev + ε
    m.mul_(beta).add_(grad, alpha=1 - beta)
    v.addcmul_(grad, grad, value=1 - beta)
    seen = v + eps
    p.mul_(kept).addcmul_(m, m, value=1 - beta).div_(seen).masked_fill_(seen == 0, 0)
    return AlignmentStep(preconditioner=p, gamma=_gamma(m, v, offset, eps, correction))


def _gamma(m: Tensor, v: Tensor, offset: Tensor, eps: float, correction: Correction) -> Tensor:
    match correction:
        case "none":
            return torch.zeros_like(m)
        case "half":
            return torch.full_like(m, 0.5)
        case "full":
            return torch.ones_like(m)
        case "hard":
            opposes = m.sign() * offset.sign()  # signs first: the product itself may underflow
        case "erf":
            variance = (v - m * m).clamp_(min=0)
            z = m.abs().div_(variance.mul_(2).add_(eps).sqrt_()).masked_fill_(m == 0, 0)
            opposes = z.erf_() * m.sign() * offset.sign()
    return opposes.mul_(0.5).add_(0.5)

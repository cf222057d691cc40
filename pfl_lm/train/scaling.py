"""Gradients through a float16 backbone: scaled on their way, and steps that overflow left out.

    loss · S  →  backward in float16  →  g / S in float32  →  is every number of g finite?
                                                               yes: the step is taken
                                                               no:  nothing moves, S ← S / 2

float16 holds nothing below 6e-8, where most gradients of a token's loss are, and nothing above
65504. S is a power of two, so that it changes no digit of what fits. A step that is left out is
one of the turn's T: it moves no weight and no moment, be they the optimizer's or a method's, takes
no correction, and is counted. S goes on from a client's turn to its next.

The adapter is float32 throughout: nothing is cast on the way, as autocast would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from typing_extensions import override

if TYPE_CHECKING:
    from pfl_lm.model.adapter import Adapter

SCALE, STREAK = "loss_scale", "loss_scale_steps"
"""What a turn's summary calls S, and the steps since it has last changed."""

FIRST_SCALE = 2.0**16


def scaling_for(adapter: Adapter, before: Mapping[str, float]) -> ScaledGradients | None:
    """Return what scales the gradients of an adapter, as a client's last turn has left it.

    ``before`` is that turn's summary; only a float16 backbone has anything to scale.
    """
    if not adapter.is_half:
        return None
    scale, streak = before.get(SCALE, FIRST_SCALE), int(before.get(STREAK, 0))
    return ScaledGradients(adapter.weights.device.type, scale, streak)


class ScaledGradients(MixedPrecision):
    """Lightning's scaler for float16, without its autocast.

    Args:
        device: the kind of device the adapter is on.
        scale: S to begin with.
        streak: how many steps S has stayed as it is; after 2000 it doubles.

    Attributes:
        left_out: optimizer steps so far that overflowed.
    """

    def __init__(self, device: str, scale: float = FIRST_SCALE, streak: int = 0) -> None:
        scaler = torch.amp.GradScaler(device, init_scale=scale)
        scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": streak})
        super().__init__("16-mixed", device, scaler)
        self.left_out = 0

    @override
    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Leave every type as it is."""
        yield

    @override
    def _after_closure(self, model: Any, optimizer: Any) -> None:
        """Count a step that is to be left out, before anybody's callback touches its gradient."""
        self.left_out += not bool(model.adapter.grads.isfinite().all())
        super()._after_closure(model, optimizer)

    def summary(self) -> dict[str, float]:
        """Return what a turn says of its scale, and of the steps that it left out."""
        state = self.state_dict()
        return {
            "skipped_steps": float(self.left_out),
            SCALE: float(state["scale"]),
            STREAK: float(state["_growth_tracker"]),
        }

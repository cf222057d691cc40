"""AdamW's moments as part of a client's private state, for trainings that go on from turn to turn.

Such a training's R turns of T steps are one loop of R·T steps. Plain SGD has no moments to keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pfl_lm.layout import Vector
from pfl_lm.methods.base import ClientState
from pfl_lm.train import Moments

if TYPE_CHECKING:
    from pfl_lm.recipe import TrainingOptions

FIRST, SECOND, STEP = "adamw_first", "adamw_second", "adamw_step"


def with_moments(vectors: dict[str, Vector], moments: Moments | None) -> ClientState:
    """Return a client's state of these vectors and of the moments, if there are any."""
    if moments is None:
        return ClientState(vectors, {STEP: 0.0})
    kept = {FIRST: moments.first, SECOND: moments.second}
    return ClientState({**vectors, **kept}, {STEP: float(moments.step)})


def fresh_moments(training: TrainingOptions, like: Vector) -> Moments | None:
    """Return the moments of an optimizer that has taken no step; None for SGD."""
    if training.optimizer != "adamw":
        return None
    return Moments(torch.zeros_like(like), torch.zeros_like(like))


def kept_moments(client: ClientState) -> Moments | None:
    """Return a copy of a client's moments that a turn may change; None if it has none."""
    if FIRST not in client.vectors:
        return None
    first, second = client.vectors[FIRST].clone(), client.vectors[SECOND].clone()
    return Moments(first, second, step=int(client.scalars[STEP]))

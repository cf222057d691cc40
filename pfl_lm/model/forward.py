"""Another forward in the place of a module's own, for as long as it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]


def replace_forward(module: nn.Module, change: Callable[[Forward], Forward]) -> Callable[[], None]:
    """Put what ``change`` makes of a module's forward in its place; return what puts it back.

    A forward that somebody else has put there, as Accelerate does, is kept and comes back.
    """
    before = module.__dict__.get("forward")
    module.forward = change(module.forward)

    def restore() -> None:
        del module.forward
        if before is not None:
            module.forward = before

    return restore

"""Layers that keep their input alone for the backward pass, and run once more when it comes.

What a layer would have kept is made again from the same numbers, with the same dropout: gradients
are the same to the bit. Where there is no backward pass, as in scoring, layers run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pfl_lm.errors import ModelError
from pfl_lm.model.forward import replace_forward


class CheckpointedLayers:
    """Layers that are run by ``torch.utils.checkpoint`` until ``close``.

    Args:
        layers: the ones that are; None if the model has no one list of layers.

    Raises:
        ModelError: there is no such list.
    """

    def __init__(self, layers: Iterable[nn.Module] | None) -> None:
        if layers is None:
            raise ModelError(
                "training.gradient_checkpointing: the backbone's layers are not in one list, so "
                "it is not known what to run twice",
                hint="set training.gradient_checkpointing: false",
            )
        self._restore = [replace_forward(layer, _twice) for layer in layers]

    def close(self) -> None:
        """Let the layers keep what they make again."""
        for restore in self._restore:
            restore()


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*given: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*given, **named)
        return checkpoint(forward, *given, use_reentrant=False, **named)

    return run

"""The backbone's layers compiled by ``torch.compile``, one by one, for as long as an adapter is in.

Layers are alike, so what is compiled for the first serves the others. Embedding, head and the
trunk below the adapter are left as they are. A compiled layer fuses what a plain one rounds apart:
its numbers are the same but for rounding, which in bfloat16 shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pfl_lm.errors import ModelError


class CompiledLayers:
    """Layers that are compiled until ``close``; compiling itself comes with the first batches.

    Args:
        model: whose layers they are; it is run once, on three tokens.
        layers: the ones to compile; None if the model has no one list of layers.

    Raises:
        ModelError: there is no such list, or this machine cannot compile them.
    """

    def __init__(self, model: Any, layers: Iterable[nn.Module] | None) -> None:
        hint = "set runtime.compile: false"
        if layers is None:
            raise ModelError(
                "runtime.compile: the backbone's layers are not in one list, so it is not known "
                "what to compile",
                hint=hint,
            )
        self._layers = list(layers)
        for layer in self._layers:
            layer.compile(dynamic=True)
        ids = torch.tensor([[1, 2, 3]], device=model.device)
        try:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except Exception as error:  # whatever a compiler says
            self.close()
            reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(
                f"runtime.compile: this machine cannot compile the backbone ({reason})", hint=hint
            ) from error

    def close(self) -> None:
        """Let the layers run as they are again."""
        for layer in self._layers:
            layer._compiled_call_impl = None

"""Logits where they are wanted, and nowhere else.

A vocabulary of 50,000 makes the head a fifth of a small model's forward, and its logits most of the
memory. Only positions that predict a supervised token have a loss, so only those go through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def logits_at(model: Any, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Return a causal language model's logits at some positions of a batch, ``(n, vocab)``.

    Args:
        model: called with ``inputs``; its head is narrowed if it is a plain linear one.
        inputs: ``input_ids`` and others of shape ``(batch, seq)``.
        positions: ``(n,)`` int64, into the batch flattened row by row.

    What a model does to logits after its head, such as scaling them, it does to each by itself.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    narrowed = False

    def narrow(module: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor] | None:
        nonlocal narrowed
        if len(given) != 1:
            return None
        narrowed = True
        states: Tensor = given[0]
        return (states.flatten(0, 1)[positions].unsqueeze(0),)

    if type(head) is not nn.Linear:  # one with an adapter has to see every token
        logits: Tensor = model(**inputs).logits
    else:
        handle = head.register_forward_pre_hook(narrow)
        try:
            logits = model(**inputs).logits
        finally:
            handle.remove()
    return logits[0] if narrowed else logits.flatten(0, 1)[positions]

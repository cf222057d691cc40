"""How many floating-point operations a training step takes, counted from the model's own shapes.

With N numbers in a layer's frozen matrices, P of them in its adapters, S tokens in a padded row, h
the width of all attention heads together, k the lowest layer with an adapter, and H numbers in the
head; for each token of a padded batch, a multiplication and an addition being two operations:

    forward, a layer              2 (N + P) + 4 S h
    backward, a layer above k     2 (N + P) + 2 P + 8 S h     to the activations, and to adapters
    backward, layer k             the same without matrices that read the layer's own input:
                                  nothing below them has a gradient to be sent to
    head, forward and backward    4 H                         at the positions that get logits

Nothing goes backward below layer k; with a remembered trunk nothing goes forward there either. With
adapters in all layers this is the usual 4 N a token, plus attention, adapters and head. Attention
is counted over the whole square, with keys' gradients. Embeddings, norms, activations and rotations
are not counted: they are no products.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfl_lm.layout import layer_of
from pfl_lm.model.adapter import adaptable


@dataclass(frozen=True, slots=True)
class Shape:
    """A padded batch: its rows, its tokens a row, and its positions that get logits."""

    rows: int
    tokens: int
    logits: int

    @classmethod
    def of(cls, batch: Mapping[str, Any], *, everywhere: bool = False) -> Shape:
        """Return a batch's shape; ``everywhere`` if every position gets logits."""
        ids: Tensor = batch["input_ids"]
        rows, tokens = ids.shape
        return cls(rows, tokens, rows * tokens if everywhere else len(batch["positions"]))


@dataclass(frozen=True, slots=True)
class Matrices:
    """The numbers that a model with its adapter multiplies by, for each token.

    Attributes:
        forward: of every layer, N + P.
        backward: of every layer, N and P where the input has a gradient, and P once more.
        lowest: k.
        head: H.
        width: h.
    """

    forward: dict[int, int]
    backward: dict[int, int]
    lowest: int
    head: int
    width: int

    @classmethod
    def of(cls, model: Any, adapted: Iterable[str]) -> Matrices:
        """Count a model with its adapter in; ``adapted`` are the names of the adapted modules.

        Runs the model on two tokens, to see which inputs have a gradient.
        """
        head = model.get_output_embeddings()
        forward, backward = dict[int, int](), dict[int, int]()
        has_gradient = _inputs_with_gradient(model)
        for name, module in model.named_modules():
            layer = layer_of(name)
            if module is head or layer is None or not adaptable(module):
                continue
            n, learns = module.weight.numel(), bool(module.weight.requires_grad)
            forward[layer] = forward.get(layer, 0) + n
            backward[layer] = backward.get(layer, 0) + n * ((module in has_gradient) + learns)
        config = model.config
        heads = getattr(config, "num_attention_heads", 0)
        one = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
        lowest = min((layer_of(name) or 0 for name in adapted), default=0)
        return cls(forward, backward, lowest, head.weight.numel() if head else 0, heads * one)

    def step(self, shape: Shape, *, trunk: bool = False) -> int:
        """Return the operations of a forward and backward over one batch.

        ``trunk``: what comes out of the layers below k is remembered.
        """
        attention = shape.tokens * self.width
        for_a_token = sum(
            2 * n + 4 * attention
            for layer, n in self.forward.items()
            if layer >= self.lowest or not trunk
        )
        for_a_token += sum(
            2 * n + 8 * attention for layer, n in self.backward.items() if layer >= self.lowest
        )
        return shape.rows * shape.tokens * for_a_token + 4 * self.head * shape.logits


def _inputs_with_gradient(model: nn.Module) -> set[nn.Module]:
    """Return the modules whose input has a gradient while the model trains."""
    found: set[nn.Module] = set()

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if given and given[0].requires_grad:
            found.add(module)

    handles = [
        module.register_forward_pre_hook(look) for module in model.modules() if adaptable(module)
    ]
    try:
        with torch.enable_grad():
            device = next(model.parameters()).device
            model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return found

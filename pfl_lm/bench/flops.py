"""How many floating-point operations a training step takes, counted from the model's own shapes.

With N numbers in a layer's matrices, P of them in its adapters, S tokens in a padded row, h the
width of all attention heads together, k the lowest layer with an adapter, and H numbers in the
head; for each token of a padded batch, in operations (a multiplication and an addition are two):

    forward, of a layer            2 N + 2 P + 4 S h
    backward, of a layer above k   2 N + 4 P + 8 S h      to the activations; adapters learn, too
    backward, of layer k           the same, less 2 for each number of an adapted matrix and of its
                                   A: nothing below has a gradient to be sent
    head, forward and backward     4 H                    at the positions that get logits

Without adapters below k nothing goes backward there; with a remembered trunk nothing goes forward
there either. With adapters in all layers and N numbers in all of them this is the usual 4 N a
token, plus attention, adapters and head. Attention is counted as it is computed, over the whole
square. Embeddings, norms, activations and rotations are not counted: they are no products.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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
    """The numbers in a model's matrices, by layer, and the head's; adapters apart.

    Attributes:
        base: of every layer.
        adapters: of every layer.
        dead: of layer k, the numbers whose input needs no gradient.
        lowest: k.
        head: of the head.
        width: of all attention heads together.
    """

    base: dict[int, int]
    adapters: dict[int, int]
    dead: int
    lowest: int
    head: int
    width: int

    @classmethod
    def of(cls, model: Any, adapted: Iterable[str]) -> Matrices:
        """Count a model with its adapter in; ``adapted`` are the names of the adapted modules."""
        adapted = set(adapted)
        lowest = min((_layer(name) or 0 for name in adapted), default=0)
        head = model.get_output_embeddings()
        base, adapters, dead = dict[int, int](), dict[int, int](), 0
        for name, module in model.named_modules():
            layer = _layer(name)
            if module is head or layer is None or not _multiplies(module):
                continue
            n = module.weight.numel()
            is_adapter = ".lora_" in name
            of = adapters if is_adapter else base
            of[layer] = of.get(layer, 0) + n
            above = name.removesuffix(".base_layer").partition(".lora_A")[0]
            if layer == lowest and above in adapted and ".lora_B" not in name:
                dead += n
        config = model.config
        heads = getattr(config, "num_attention_heads", 0)
        one = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
        return cls(base, adapters, dead, lowest, head.weight.numel() if head else 0, heads * one)

    def step(self, shape: Shape, *, trunk: bool = False) -> int:
        """Return the operations of a forward and backward over one batch.

        ``trunk``: what comes out of the layers below k is remembered.
        """
        tokens = shape.rows * shape.tokens
        attention = shape.tokens * self.width
        forward = sum(
            2 * n + 2 * self.adapters.get(layer, 0) + 4 * attention
            for layer, n in self.base.items()
            if layer >= self.lowest or not trunk
        )
        backward = sum(
            2 * n + 4 * self.adapters.get(layer, 0) + 8 * attention
            for layer, n in self.base.items()
            if layer >= self.lowest
        )
        return tokens * (forward + backward - 2 * self.dead) + 4 * self.head * shape.logits


def _layer(name: str) -> int | None:
    """Return which layer a module is in: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"

"""One training step and one scoring batch without any numbers: what blocks of memory they take.

The model runs forward and backward on fake tensors, which have shapes, types and lifetimes but no
storage. A dispatch mode sees every tensor an operation makes and notices when it goes, so nothing
has to be known of the architecture: not which activations a layer keeps for its backward, and not
how many copies of the logits a loss makes.

    kept for backward     of the layers from the lowest adapted one up: below it nothing has a
                          gradient, so nothing is kept
    logits                supervised tokens × vocabulary, in the model's type, again in float32,
                          again as log-probabilities, and in training their gradients

Blocks are counted in two kinds, since a C allocator treats them so: see ``memory.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from typing_extensions import override

from pfl_lm.recipe.task import TaskName
from pfl_lm.train.loss import nll_by_row, nll_sum

LARGE = 32 * 2**20
"""Bytes from which glibc maps a block of its own at the latest, and unmaps it when it is freed."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The most bytes alive at a time, in small blocks and in large ones."""

    small: int
    large: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The largest batch of its kind: how many rows, how many tokens each, how many supervised."""

    rows: int
    tokens: int
    supervised: int


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What one micro-batch of training and one batch of scoring take beside the weights."""

    train: Blocks
    score: Blocks


def rehearse(
    model: nn.Module,
    train: Shape,
    score: Shape,
    device: torch.device,
    task: TaskName = "causal_lm",
) -> Rehearsal:
    """Run both batches through a model that lies on the meta device, adapter included.

    Spends the model: its parameters are fake ones afterwards.
    """
    with FakeTensorMode():
        known = _pretend(model, device)
        model.train()
        batch = _batch(train, device, task)
        with _Blocks([*known, *batch.values()]) as in_training:
            nll_sum(model, batch).backward()  # type: ignore[no-untyped-call]
        model.eval()
        batch = _batch(score, device, task)
        with torch.no_grad(), _Blocks([*known, *batch.values()]) as in_scoring:
            nll_by_row(model, batch)
    return Rehearsal(in_training.most, in_scoring.most)


class _Blocks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storage of every tensor made while it is active, until that storage goes."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, tuple[bool, int]] = {}
        self._known = {_key(tensor) for tensor in known}
        self._bytes = {False: 0, True: 0}
        self._most = {False: 0, True: 0}

    @property
    def most(self) -> Blocks:
        """The high-water marks so far."""
        return Blocks(small=self._most[False], large=self._most[True])

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return made

    def _count(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._known or key in self._alive:
            return
        storage = tensor.untyped_storage()
        n = storage.nbytes()
        self._alive[key] = large, _ = n >= LARGE, n
        self._bytes[large] += n
        self._most[large] = max(self._most[large], self._bytes[large])
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        large, n = self._alive.pop(key)
        self._bytes[large] -= n


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _pretend(model: nn.Module, device: torch.device) -> list[Tensor]:
    """Put fake tensors on ``device`` in the place of a model's meta ones; return them."""
    fakes: dict[Tensor, Tensor] = {}  # by the tensor itself: tied weights stay tied
    for module in list(model.modules()):
        for name, own in list(module.named_parameters(recurse=False)):
            if own not in fakes:
                like = torch.empty(own.shape, dtype=own.dtype, device=device)
                fakes[own] = nn.Parameter(like, requires_grad=own.requires_grad)
            setattr(module, name, fakes[own])
        for name, buffer in list(module.named_buffers(recurse=False)):
            fakes[buffer] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            setattr(module, name, fakes[buffer])
    return list(fakes.values())


def _batch(shape: Shape, device: torch.device, task: TaskName) -> dict[str, Tensor]:
    def ones(*size: int) -> Tensor:
        return torch.ones(size, dtype=torch.int64, device=device)

    size = (shape.rows, shape.tokens)
    given = {"input_ids": ones(*size), "attention_mask": ones(*size)}
    match task:
        case "sequence_classification":
            return {**given, "classes": ones(shape.rows)}
        case "seq2seq_lm":
            return {**given, "targets": ones(shape.rows, shape.supervised)}
    labels = ones(*size)
    positions = labels.new_zeros(shape.rows * shape.supervised)
    return {**given, "labels": labels, "positions": positions}

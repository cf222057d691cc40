"""The gradient of each row by itself, through Opacus, beside the ordinary one of their sum.

Opacus puts hooks on the modules that hold trainable parameters. In a backward pass of a loss that
is a sum over rows they leave ``parameter.grad_sample``, ``(rows, *shape)``: row i's own gradient.
PEFT's parameters and their ``.grad`` stay the views into flat vectors that they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pfl_lm.errors import ModelError
from pfl_lm.layout import Entry

if TYPE_CHECKING:
    from pfl_lm.model.adapter import Adapter


@contextmanager
def watched_rows(adapter: Adapter) -> Iterator[None]:
    """Keep the gradient of every row in the body; leave the model as it was.

    Only what can be trained when the body begins is watched. The loss that goes backward must be
    the sum of the rows' own.

    Raises:
        ModelError: in a forward pass, at a module that gets the tokens of all rows in one heap.
    """
    from opacus import GradSampleModule

    holders = {
        name: module
        for name, module in adapter.model.named_modules()
        if any(each.requires_grad for each in module.parameters(recurse=False))
    }
    heads = {
        id(parameter)
        for entry, parameter in zip(adapter.layout.entries, adapter.parameters(), strict=True)
        if entry.head
    }
    checks = [
        each.register_forward_pre_hook(_by_rows(name))
        for name, each in holders.items()
        if not any(id(own) in heads for own in each.parameters(recurse=False))
    ]  # a head may see one state of each row, and rows are then all it sees
    watcher = GradSampleModule(adapter.model, batch_first=True, loss_reduction="sum")
    try:
        with warnings.catch_warnings():  # the lowest adapted layer's input has no gradient
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        watcher.to_standard_module()  # takes Opacus' hooks and attributes away
        for check in checks:
            check.remove()
        for module in holders.values():
            for left in ("activations", "max_batch_len"):  # of a pass that was broken off
                module.__dict__.pop(left, None)


def take_rows(adapter: Adapter, n_rows: int) -> list[tuple[Entry, Tensor]]:
    """Return each trained matrix with its gradients by row, ``(n_rows, *shape)``; only once.

    A matrix that the pass did not touch is left out: its gradients are zero.

    Raises:
        ModelError: a module has seen another number of rows.
    """
    found = []
    for entry, parameter in zip(adapter.layout.entries, adapter.parameters(), strict=True):
        by_row = getattr(parameter, "grad_sample", None)
        if not parameter.requires_grad or by_row is None:
            continue
        parameter.grad_sample = None  # type: ignore[attr-defined]
        if not isinstance(by_row, Tensor) or len(by_row) != n_rows:
            raise _mixed(entry.module)
        found.append((entry, by_row))
    return found


def _by_rows(name: str) -> Any:
    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].dim() < 3:
            raise _mixed(name.rsplit(".", 2)[0])  # the adapted module's own name

    return check


def _mixed(module: str) -> ModelError:
    return ModelError(
        f"privacy.record_level: {module} in this backbone sees the tokens of all rows mixed, so "
        "that a row's own gradient cannot be told",
        hint="adapt other modules (adapter.target_modules), such as those of the attention",
    )

"""How much work a task is expected to be, so that the longest can begin first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pfl_lm.data.examples import Example
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.messages import Kind

_BACKWARD = 3
"""A training step's operations in those of a forward pass: one way there and two back."""


def expected_work(side: ClientSide, kind: Kind, client: str) -> float:
    """Return a task's tokens, in those of a forward pass; all that counts is their proportion."""
    data = side.dataset
    if kind != "train":
        rows = data.validation(client)
        unread = len(data[client].test_rows) if kind == "finish" else 0  # not looked at before
        return _tokens(rows) * (1 + unread / len(rows))
    rows = data.train(client)
    training = side.training
    in_step = training.gradient_accumulation_steps * min(
        training.per_device_train_batch_size, len(rows)
    )
    steps = side.method.fits * training.steps_for(len(rows))
    return _BACKWARD * steps * in_step * _tokens(rows) / len(rows)


def longest_first(side: ClientSide, kind: Kind, clients: Iterable[str]) -> list[str]:
    """Return clients in the order of their tasks' work; equal ones stay in theirs."""
    return sorted(clients, key=lambda client: -expected_work(side, kind, client))


def _tokens(examples: Sequence[Example]) -> float:
    return float(sum(len(example.input_ids) for example in examples))

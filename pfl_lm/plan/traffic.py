"""What a method keeps and sends, counted on vectors of zeros through the method's own rules.

One client takes turns in which training moves nothing, in two rounds, since a method may do in even
rounds what it does not in odd ones. So there is no table of sizes to keep: a method that sends half
a vector, or keeps five, is counted as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pfl_lm.federation.ledger import size_in_bytes
from pfl_lm.layout import AdapterLayout, Vector
from pfl_lm.methods import ClientInfo, Method

FLOAT = 4
"""Bytes of one number of an adapter, which is float32 whatever the backbone is."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of tensors, by what they are.

    Attributes:
        state: what a client keeps between its turns, by the vectors' names.
        server: what the server keeps between rounds.
        ups: what one client sends in a turn of round 1, and of round 2 if there is one.
        down: what one client is sent for a turn.
        candidates: the models a client's own is chosen from, without the backbone.
    """

    state: dict[str, int]
    server: int
    ups: tuple[int, ...]
    down: int
    candidates: tuple[str, ...]

    @property
    def up(self) -> int:
        """The most that one client sends in a turn."""
        return max(self.ups)


@dataclass
class _NoTraining:
    """A `LocalRun` that ends where it starts."""

    steps: int = 1
    n_examples: int = 1
    n_tokens: int = 1
    learning_rate: float = 1.0
    summary: dict[str, float] = field(default_factory=dict)

    def train(self, start: Vector, **how: Any) -> Vector:
        """Return the start."""
        return start.clone()

    def loss_and_grad(self, at: Vector, batch: Mapping[str, Any]) -> tuple[float, Vector]:
        """Return a gradient of zeros."""
        return 0.0, torch.zeros_like(at)


def count_traffic(method: Method, layout: AdapterLayout, rounds: int, id: str = "") -> Traffic:
    """Take a turn without training in each of the first two rounds; measure what goes where.

    ``layout`` is that of the server, or of the client ``id`` if its adapter is smaller.
    """
    server = method.init_server(torch.zeros(method.setup.layout.d))
    client = method.init_client(ClientInfo(id, 1, layout), torch.zeros(layout.d))
    ups = []
    for round in range(1, min(rounds, 2) + 1):
        sent = method.broadcast(server, id)
        upload, client = method.turn(sent, client, _NoTraining())
        ups.append(size_in_bytes(upload.vectors.values()))
        server = method.aggregate(server, [replace(upload, client=id)], round)
    return Traffic(
        state={name: size_in_bytes([vector]) for name, vector in sorted(client.vectors.items())},
        server=size_in_bytes(server.vectors.values()),
        ups=tuple(ups),
        down=size_in_bytes(sent.vectors.values()),
        candidates=tuple(method.candidates(sent, client)),
    )

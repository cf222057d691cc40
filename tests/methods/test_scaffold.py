"""SCAFFOLD on quadratics, F_k(w) = ½ h_k (w - a_k)², where every number can be known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pfl_lm.layout import AdapterLayout
from pfl_lm.methods import METHODS, ClientInfo, ClientState, Method, ServerState, Setup, Upload
from pfl_lm.recipe.methods import METHOD_OPTIONS
from tests.world import options

LAYOUT = AdapterLayout.of([("q", "A", (1,)), ("q", "B", (1,))])
RATE = 0.1
CURVES = {"a": (1.0, 0.0), "b": (4.0, 1.0), "c": (2.0, -2.0)}
BEST = sum(h * a for h, a in CURVES.values()) / sum(h for h, _ in CURVES.values())
"""Where Σ F_k is least."""


@dataclass
class Quadratic:
    """A client's turn: T steps of SGD on its own quadratic, with what the method adds."""

    curvature: float
    goal: float
    steps: int
    n_examples: int = 1
    n_tokens: int = 1
    learning_rate: float = RATE
    summary: dict[str, float] = field(default_factory=dict)

    def train(self, start: Tensor, *, callbacks: Sequence[Any] = (), **how: Any) -> Tensor:
        shift = sum((c.shift for c in callbacks), torch.zeros(2))
        w = start.clone()
        for _ in range(self.steps):
            w -= self.learning_rate * (self.curvature * (w - self.goal) + shift)
        return w

    def loss_and_grad(self, at: Tensor, batch: Mapping[str, Any]) -> tuple[float, Tensor]:
        raise NotImplementedError


def method_of(
    name: str = "scaffold",
    n_clients: int = 3,
    rates: Mapping[str, float] | None = None,
    **own: Any,
) -> Method:
    setup = Setup(LAYOUT, n_clients, 0, options(learning_rate=RATE), rates=rates or {})
    return METHODS[name](METHOD_OPTIONS[name].model_validate({"name": name, **own}), setup)


def new_client(method: Method) -> ClientState:
    return method.init_client(ClientInfo("", 1, LAYOUT), torch.zeros(2))


def federate(
    method: Method, rounds: int, steps: Mapping[str, int], size: int = 3
) -> tuple[ServerState, dict[str, ClientState]]:
    """Run rounds of ``size`` clients, each time the next ones in a circle."""
    server = method.init_server(torch.zeros(2))
    states = {client: new_client(method) for client in CURVES}
    for round in range(rounds):
        cohort = [list(CURVES)[(round + i) % 3] for i in range(size)]
        uploads = []
        for client in cohort:
            run = Quadratic(*CURVES[client], steps[client])
            sent = method.broadcast(server, client)
            upload, states[client] = method.turn(sent, states[client], run)
            uploads.append(upload)
        server = method.aggregate(server, uploads, round + 1)
    return server, states


def where(server: ServerState) -> float:
    return float(server.vectors["global_weights"][0])


EVEN = dict.fromkeys(CURVES, 8)
UNEVEN = {"a": 2, "b": 8, "c": 5}


@pytest.mark.parametrize("steps", [EVEN, UNEVEN], ids=["T alike", "T of its own"])
@pytest.mark.parametrize("size", [3, 2, 1])
def test_it_ends_where_the_sum_of_the_losses_is_least(steps: dict[str, int], size: int) -> None:
    """At a fixed point c_i is ∇F_i there and c is 0; FedAvg with as many steps drifts elsewhere."""
    server, states = federate(method_of(), 600, steps, size)
    assert where(server) == pytest.approx(BEST, abs=1e-4)
    for client, (h, a) in CURVES.items():
        kept = float(states[client].vectors["control"][0])
        assert kept == pytest.approx(h * (BEST - a), abs=1e-3)
    fedavg, _ = federate(method_of("fedavg", weighting="uniform"), 600, steps)
    assert abs(where(fedavg) - BEST) > 0.1


def test_rates_of_their_own_lead_to_the_same_point() -> None:
    """The server divides by T η of each client, and clients by their own."""
    rates = {"a": RATE / 4, "c": RATE / 2}
    method = method_of(rates=rates)
    server = method.init_server(torch.zeros(2))
    states = {client: new_client(method) for client in CURVES}
    for round in range(1500):
        uploads = []
        for client in CURVES:
            run = Quadratic(*CURVES[client], UNEVEN[client])
            run.learning_rate = rates.get(client, RATE)
            sent = method.broadcast(server, client)
            upload, states[client] = method.turn(sent, states[client], run)
            uploads.append(replace(upload, client=client))
        server = method.aggregate(server, uploads, round + 1)
    assert where(server) == pytest.approx(BEST, abs=1e-3)
    kept = torch.stack([state.vectors["control"] for state in states.values()]).mean(0)
    torch.testing.assert_close(server.vectors["control"], kept, rtol=0, atol=1e-4)
    for client, (h, a) in CURVES.items():
        found = float(states[client].vectors["control"][0])
        assert found == pytest.approx(h * (BEST - a), abs=1e-2)


@pytest.mark.parametrize("size", [3, 2, 1])
def test_c_is_the_mean_of_all_c_i(size: int) -> None:
    for rounds in (1, 2, 7):
        server, states = federate(method_of(), rounds, UNEVEN, size)
        mean = torch.stack([s.vectors["control"] for s in states.values()]).mean(dim=0)
        torch.testing.assert_close(server.vectors["control"], mean, rtol=1e-5, atol=1e-6)


def test_the_server_by_hand() -> None:
    """x = 1, c = 0, η = 0.1, N = 4; y = 0.5 after 2 steps and 2 after 1: Δc = 2.5 and -10."""
    method = method_of(n_clients=4, server_learning_rate=0.5)
    server = method.init_server(torch.tensor([1.0, 1.0]))
    uploads = [
        Upload({"weights": torch.tensor([0.5, 1.0])}, 1.0, {"steps": 2.0}),
        Upload({"weights": torch.tensor([2.0, 1.0])}, 1.0, {"steps": 1.0}),
    ]
    server = method.aggregate(server, uploads, 1)
    assert server.vectors["global_weights"].tolist() == pytest.approx([1.125, 1.0])
    assert server.vectors["control"].tolist() == pytest.approx([-7.5 / 4, 0.0])
    still = Upload({"weights": server.vectors["global_weights"]}, 1.0, {"steps": 1.0})
    server = method.aggregate(server, [still], 2)  # Δc = -c, of one among four
    assert server.vectors["control"].tolist() == pytest.approx([-7.5 / 4 * 3 / 4, 0.0])


def test_a_turn_by_hand() -> None:
    """x = 1, c = 2, c_i = -1, η = 0.1, F = ½ w²: y = 1 - 0.1 (1 + 1 + 2) = 0.6, c_i⁺ = -3 + 4."""
    method = method_of()
    server = ServerState({"global_weights": torch.ones(2), "control": torch.full((2,), 2.0)})
    client = ClientState({"weights": torch.zeros(2), "control": torch.full((2,), -1.0)})
    sent = method.broadcast(server, "")
    upload, kept = method.turn(sent, client, Quadratic(1.0, 0.0, 1))
    assert upload.vectors["weights"].tolist() == pytest.approx([0.6, 0.6])
    assert upload.scalars == {"steps": 1.0}
    assert kept.vectors["control"].tolist() == pytest.approx([1.0, 1.0])  # the gradient at x

    alone, kept = method.turn(replace(sent, counted=False), client, Quadratic(1.0, 0.0, 1))
    assert torch.equal(alone.vectors["weights"], upload.vectors["weights"])
    assert kept.vectors["control"].tolist() == [-1.0, -1.0]


def test_when_clients_join_the_sum_is_of_more() -> None:
    """Three clients with Σ c_i = 6 and one who has not trained yet: c = 6/4 after an empty turn."""
    server = ServerState(
        {"global_weights": torch.ones(2), "control": torch.full((2,), 2.0)}, {"n_clients": 3.0}
    )
    end = torch.ones(2) - 0.1 * 2.0  # y = x - η c, so that Δc = 0
    after = method_of(n_clients=4).aggregate(
        server, [Upload({"weights": end}, 1.0, {"steps": 1.0})], 1
    )
    assert after.vectors["control"].tolist() == pytest.approx([1.5, 1.5])
    assert after.scalars == {"n_clients": 4.0}


def test_steps_that_were_left_out_are_none_of_the_t() -> None:
    """Of two steps one overflowed: as a turn of one. Of one, none is left: nothing moves."""
    method = method_of()
    server = ServerState(
        {"global_weights": torch.ones(2), "control": torch.full((2,), 2.0)}, {"n_clients": 3.0}
    )
    client = ClientState({"weights": torch.zeros(2), "control": torch.full((2,), -1.0)})
    sent = method.broadcast(server, "")
    run = Quadratic(1.0, 0.0, 1)
    alone = method.turn(sent, client, run)
    run.train = Quadratic(1.0, 0.0, 1).train  # type: ignore[method-assign]
    run.steps, run.summary["skipped_steps"] = 2, 1.0
    upload, kept = method.turn(sent, client, run)
    assert upload.scalars == alone[0].scalars == {"steps": 1.0}
    assert torch.equal(kept.vectors["control"], alone[1].vectors["control"])

    still = Quadratic(1.0, 0.0, 0)
    still.steps, still.summary["skipped_steps"] = 1, 1.0
    still.train = lambda start, **how: start.clone()  # type: ignore[method-assign]
    upload, kept = method.turn(sent, client, still)
    assert upload.scalars == {"steps": 0.0}
    assert torch.equal(kept.vectors["control"], client.vectors["control"])
    after = method.aggregate(server, [upload], 1)
    assert torch.equal(after.vectors["control"], server.vectors["control"])


@pytest.mark.parametrize("claimed", [0.0, -3.0, 1e-30])
def test_nobody_has_taken_less_than_a_step(claimed: float) -> None:
    """A client that says so cannot blow c up for everybody."""
    method = method_of(n_clients=1)
    server = method.init_server(torch.ones(2))
    upload = Upload({"weights": torch.zeros(2)}, 1.0, {"steps": claimed})
    control = method.aggregate(server, [upload], 1).vectors["control"]
    assert control.tolist() == pytest.approx([1 / RATE] * 2)
    assert math.isfinite(float(control.sum()))

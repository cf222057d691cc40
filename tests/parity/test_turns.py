"""Whole runs against loops written by hand: bit for bit where the order of operations agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.plain import PlainClient, algorithm_1
from tests.parity.runs import (
    CLIENTS,
    ROUNDS,
    average,
    batches,
    examples,
    global_weights,
    run,
    state,
)
from tests.tiny import client_rows, tiny_model


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_local_is_a_plain_loop_per_client(tmp_path: Path, start: Tensor, optimizer: str) -> None:
    changes = {"training.optimizer": optimizer, "training.learning_rate": 0.02}
    folder = run(tmp_path, **{"method.name": "local"}, **changes)
    for client in CLIENTS:
        plain = PlainClient(tiny_model(), start)
        base = (
            torch.optim.SGD(plain.parameters, lr=0.02)
            if optimizer == "sgd"
            else torch.optim.AdamW(plain.parameters, lr=0.02, weight_decay=0.0)
        )
        for round in range(1, ROUNDS + 1):  # one optimizer for all rounds: one loop
            plain.fit(batches(tmp_path, client, round), base)
        assert not torch.equal(plain.w, start)
        assert torch.equal(state(folder, client)["weights"], plain.w)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fedavg_with_one_client_is_a_plain_loop(
    tmp_path: Path, start: Tensor, optimizer: str
) -> None:
    changes = {"training.optimizer": optimizer, "training.learning_rate": 0.02}
    folder = run(tmp_path, ("alice",), **{"method.name": "fedavg"}, **changes)
    plain = PlainClient(tiny_model(), start)
    for round in range(1, ROUNDS + 1):  # FedAvg starts its optimizer anew in every round
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        base = kind(plain.parameters, lr=0.02, weight_decay=0.0)
        plain.fit(batches(tmp_path, "alice", round), base)
    assert torch.equal(global_weights(folder), plain.w)


def test_fedavg_is_the_weighted_average_of_plain_loops(tmp_path: Path, start: Tensor) -> None:
    rows = [*client_rows(("alice",), n_rows=12), *client_rows(("bob", "carol"))]
    folder = run(tmp_path, rows=rows, **{"method.name": "fedavg", "training.learning_rate": 0.5})
    shared, sizes = start, [len(examples(tmp_path, client)) for client in CLIENTS]
    assert len(set(sizes)) > 1
    for round in range(1, ROUNDS + 1):
        ends = []
        for client in CLIENTS:
            plain = PlainClient(tiny_model(), shared)
            base = torch.optim.SGD(plain.parameters, lr=0.5)
            ends.append(plain.fit(batches(tmp_path, client, round), base))
        shared = average(ends, sizes)
    torch.testing.assert_close(global_weights(folder), shared, rtol=1e-6, atol=1e-8)


def test_pflalign_without_its_mechanisms_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    off = {"preconditioner": False, "correction": "none", "personalized_start": False}
    changes = {f"method.{key}": value for key, value in off.items()}
    ablated = run(tmp_path / "a", **{"training.learning_rate": 0.5}, **changes)
    fedavg = run(tmp_path / "b", **{"training.learning_rate": 0.5, "method.name": "fedavg"})
    assert torch.equal(global_weights(ablated), global_weights(fedavg))
    for client in CLIENTS:
        assert torch.equal(state(ablated, client)["weights"], state(fedavg, client)["weights"])


def test_pflalign_is_algorithm_1(tmp_path: Path, start: Tensor) -> None:
    rate = 2.0
    folder = run(tmp_path, **{"training.learning_rate": rate})

    def published(P: Tensor, g: Tensor) -> Tensor:
        return -rate * P * g

    shared, memories = _algorithm_1(tmp_path, start, lambda plain: published)
    torch.testing.assert_close(global_weights(folder), shared.float(), rtol=1e-4, atol=1e-6)
    for client in CLIENTS:
        kept, memory = state(folder, client), memories[client]
        assert float(memory["offset"].norm()) > 1e-3
        torch.testing.assert_close(kept["offset"].double(), memory["offset"], rtol=1e-3, atol=2e-6)
        torch.testing.assert_close(
            kept["preconditioner"].double(), memory["P"], rtol=2e-3, atol=1e-5
        )


def test_pflalign_on_adamws_direction_keeps_its_size(tmp_path: Path, start: Tensor) -> None:
    rate = 0.01
    update = {"method.precondition_target": "update", "method.update_scale": "match"}
    folder = run(
        tmp_path, **{"training.learning_rate": rate, "training.optimizer": "adamw"}, **update
    )

    def steps(plain: PlainClient) -> Any:
        """AdamW by hand, its direction times P, each matrix scaled to AdamW's own size."""
        first = torch.zeros(start.numel(), dtype=torch.float64)
        second, t = first.clone(), 0

        def step(P: Tensor, g: Tensor) -> Tensor:
            nonlocal first, second, t
            t += 1
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            u = -rate * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
            change = P * u
            for part, own in zip(plain.matrices(change), plain.matrices(u), strict=True):
                size = part.square().mean().sqrt()
                part.mul_(own.square().mean().sqrt() / size if size > 0 else 0.0)
            return change

        return step

    shared, memories = _algorithm_1(tmp_path, start, steps)
    torch.testing.assert_close(global_weights(folder), shared.float(), rtol=1e-3, atol=1e-5)
    for client in CLIENTS:
        offset = state(folder, client)["offset"].double()
        torch.testing.assert_close(offset, memories[client]["offset"], rtol=1e-2, atol=2e-5)


def _algorithm_1(
    tmp_path: Path, start: Tensor, steps: Any
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """Run the reference over all rounds and clients; each has as many train rows as the others."""
    memories: dict[str, dict[str, Tensor]] = {client: {} for client in CLIENTS}
    plain = {client: PlainClient(tiny_model(), start) for client in CLIENTS}
    shared = start.double()
    for round in range(1, ROUNDS + 1):
        ends = [
            algorithm_1(
                plain[client],
                memories[client],
                shared,
                batches(tmp_path, client, round),
                steps(plain[client]),
            )
            for client in CLIENTS
        ]
        shared = torch.stack(ends).mean(dim=0)
    return shared, memories

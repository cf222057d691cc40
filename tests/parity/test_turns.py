"""Whole runs against loops written by hand: bit for bit where the order of operations agrees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pfl_lm.data.batches import training_batches
from pfl_lm.data.examples import Example
from pfl_lm.data.render import render
from pfl_lm.data.sources import read_records
from pfl_lm.data.splits import split_clients
from pfl_lm.finetune import finetune
from pfl_lm.recipe import load_recipe
from pfl_lm.recipe.sections import DataOptions
from pfl_lm.seeds import derive_seed
from tests.parity.plain import PlainClient, algorithm_1
from tests.tiny import client_rows, make_tokenizer, tiny_model, tiny_recipe, write_jsonl

SEED, ROUNDS, STEPS = 7, 3, 2
CLIENTS = ("alice", "bob", "carol")


def run(tmp_path: Path, clients: tuple[str, ...] = CLIENTS, **changes: Any) -> Path:
    """Run a tiny recipe and return its run folder."""
    path = write_jsonl(tmp_path / "clients.jsonl", client_rows(clients))
    settings = {"data.path": str(path), "seed": SEED, "federation.rounds": ROUNDS} | changes
    return finetune(load_recipe(tiny_recipe(tmp_path, **settings))).folder


def state(folder: Path, client: str, round: int = ROUNDS) -> dict[str, Tensor]:
    return load_file(folder / "clients" / client / f"state-{round}.safetensors")


def global_weights(folder: Path) -> Tensor:
    return load_file(folder / "server" / f"state-{ROUNDS}.safetensors")["global_weights"]


def examples(tmp_path: Path, client: str) -> tuple[Example, ...]:
    options = DataOptions(path=str(tmp_path / "clients.jsonl"), split_column="split")
    rows = split_clients(read_records(options), 0.125)[client].train
    return tuple(render(make_tokenizer(), r.content).cut(128) for r in rows)


def batches(tmp_path: Path, client: str, round: int) -> list[Mapping[str, Any]]:
    loader = training_batches(
        examples(tmp_path, client),
        steps=STEPS,
        accumulation=1,
        batch_size=2,
        pad_token_id=make_tokenizer().pad_token_id,
        seed=derive_seed(SEED, "turn", client, round),
    )
    return list(loader)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """The adapter every client starts from: what `local` leaves on the server."""
    return global_weights(run(tmp_path_factory.mktemp("start"), **{"method.name": "local"}))


def average(vectors: list[Tensor], weights: list[int]) -> Tensor:
    stacked = np.stack([vector.double().numpy() for vector in vectors])
    return torch.from_numpy(np.average(stacked, axis=0, weights=weights)).float()


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
    path = write_jsonl(tmp_path / "uneven.jsonl", rows)
    folder = run(
        tmp_path,
        **{"method.name": "fedavg", "training.learning_rate": 0.5, "data.path": str(path)},
    )
    (tmp_path / "clients.jsonl").write_bytes(path.read_bytes())
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
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
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

"""Whole runs of a tiny federation, what they leave, and the batches that their turns saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
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
from pfl_lm.recipe.data import DataOptions
from pfl_lm.seeds import derive_seed
from tests.tiny import client_rows, make_tokenizer, tiny_recipe, write_jsonl

SEED, ROUNDS, STEPS = 7, 3, 2
CLIENTS = ("alice", "bob", "carol")


def run(
    tmp_path: Path,
    who: tuple[str, ...] = CLIENTS,
    rows: list[dict[str, str]] | None = None,
    **changes: Any,
) -> Path:
    """Run a tiny recipe and return its run folder; ``rows`` are eight of each client by default."""
    tmp_path.mkdir(exist_ok=True)
    path = write_jsonl(tmp_path / "clients.jsonl", rows or client_rows(who))
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


def average(vectors: list[Tensor], weights: list[int]) -> Tensor:
    stacked = np.stack([vector.double().numpy() for vector in vectors])
    return torch.from_numpy(np.average(stacked, axis=0, weights=weights)).float()

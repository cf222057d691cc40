"""(m) What one client holds says nothing of another's data but through what was sent."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import pfl_lm.finetune
from pfl_lm.federation.fleet.serial import SerialFleet
from pfl_lm.federation.messages import Assignment, Update
from pfl_lm.finetune import finetune
from pfl_lm.methods import METHODS, Upload
from pfl_lm.recipe import load_recipe
from tests.tiny import client_rows, tiny_recipe, write_jsonl

Uploads = dict[tuple[int, str], Upload]


def fleet(sent: Uploads, replayed: str | None = None) -> type[SerialFleet]:
    """A fleet that notes what clients send, or sends what ``replayed`` had sent before."""

    class Fleet(SerialFleet):
        def run(self, tasks: Iterable[Assignment]) -> Iterator[Update]:
            for update in super().run(tasks):
                if update.upload is None:
                    yield update
                elif update.client == replayed:
                    yield replace(update, upload=sent[update.round, update.client])
                else:
                    if replayed is None:
                        sent[update.round, update.client] = update.upload
                    yield update

    return Fleet


def states(folder: Path, client: str) -> list[str]:
    """Return the digests of a client's state after each of its turns."""
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        query = "SELECT state_sha256 FROM turns WHERE client = ? ORDER BY round"
        return [digest for (digest,) in ledger.execute(query, (client,))]


def scores(folder: Path, client: str) -> list[str]:
    lines = (folder / "metrics.csv").read_text().splitlines()
    return [line for line in lines if line.split(",")[1] == client]


@pytest.mark.parametrize("method", METHODS)
def test_another_clients_data_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    rows = client_rows()
    other = [
        {**row, "completion": f"{row['completion']} Or not."} if row["client"] == "bob" else row
        for row in rows
    ]
    sent: Uploads = {}

    def run(name: str, data: list[dict[str, str]], replayed: str | None = None) -> Path:
        monkeypatch.setattr(
            pfl_lm.finetune, "SerialFleet", fleet(sent if name != "apart" else {}, replayed)
        )
        path = write_jsonl(tmp_path / f"{name}.jsonl", data)
        changes = {"method.name": method, "data.path": str(path), "federation.rounds": 3}
        drawn = {"adapter.lora_dropout": 0.2, "training.learning_rate": 1.0}
        recipe = tiny_recipe(tmp_path, name=name, **changes, **drawn)
        return finetune(load_recipe(recipe)).folder

    first, apart = run("first", rows), run("apart", other)
    again = run("again", other, replayed="bob")

    for perturbed in (apart, again):
        assert all(
            a != b for a, b in zip(states(first, "bob"), states(perturbed, "bob"), strict=True)
        )
    for client in ("alice", "carol"):
        assert len(set(states(first, client))) == 3
        assert states(apart, client)[0] == states(first, client)[0]
        # What bob sends does reach the others, so that the replay below shows something.
        assert (states(apart, client)[1:] == states(first, client)[1:]) == (method == "local")
        assert states(again, client) == states(first, client)
        assert scores(again, client) == scores(first, client)
        exported = f"adapters/{client}/adapter_model.safetensors"
        assert (again / exported).read_bytes() == (first / exported).read_bytes()

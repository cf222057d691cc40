"""Whole runs on what is not a question with its answer."""

import json
from pathlib import Path

import pytest

from pfl_lm.recipe import load_recipe
from tests.tiny import tiny_recipe

CLIENTS = ("alice", "bob")


def conversations(folder: Path) -> Path:
    """A folder of one file for each client, the conversations of different lengths."""
    path = folder / "talks"
    path.mkdir()
    for client in CLIENTS:
        rows = [
            {
                "messages": [
                    {"role": role, "content": f"{client} {i}"} for role in roles * (1 + i % 3)
                ]
            }
            for i, roles in enumerate([("user", "assistant")] * 6)
        ]
        (path / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def passages(folder: Path) -> Path:
    """One CSV file of passages, two of each document."""
    path = folder / "passages.csv"
    rows = [f"{c},{c} said {i},{i // 2}" for c in CLIENTS for i in range(6)]
    path.write_text("\n".join(["client,text,doc", *rows]) + "\n")
    return path


def dolly(folder: Path) -> Path:
    """Rows under other names, the last of each client longer than the limit."""
    path = folder / "dolly.jsonl"
    rows = [
        {"who": c, "instruction": f"{c} {i}", "context": "", "response": "x" * (1 + 200 * (i == 5))}
        for c in CLIENTS
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_on_clients_made_out_of_rows_can_be_gone_on_with(tmp_path):
    from pfl_lm.finetune import finetune
    from pfl_lm.resume import run_recipe

    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"{c} says {i}", "who": c} for c in CLIENTS for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partition = {"name": "dirichlet", "num_partitions": 3, "partition_by": "who", "alpha": 9.0}
    data = {"data.path": str(path), "data.partition": partition, "data.split_column": None}
    data = {**data, "data.client_column": "client"}
    result = finetune(load_recipe(tiny_recipe(tmp_path, **data)))
    names = [f"client-{i}" for i in range(3)]
    assert [client.client for client in result.clients] == names
    longer = finetune(run_recipe(result.folder, rounds=3), resume=True)
    assert [client.client for client in longer.clients] == names


def test_a_run_on_renamed_columns_without_the_long_rows(tmp_path):
    from pfl_lm.federation.watch import Watch
    from pfl_lm.finetune import finetune

    class Notes(Watch):
        def __init__(self):
            self.notes = []

        def note(self, text):
            self.notes.append(text)

    data = {
        "data.path": str(dolly(tmp_path)),
        "data.columns": {"who": "client", "context": "input", "response": "output"},
        "data.split_column": None,
        "data.on_long": "drop",
        "data.max_length": 100,
    }
    watch = Notes()
    result = finetune(load_recipe(tiny_recipe(tmp_path, **data)), watch)
    expected = "2 of 12 train and validation rows are longer than data.max_length 100, and left out"
    assert expected in watch.notes
    assert [client.client for client in result.clients] == list(CLIENTS)


@pytest.mark.parametrize(("make", "group"), [(conversations, None), (passages, "doc")])
def test_a_run_ends_with_an_adapter_for_each_client(tmp_path, make, group):
    from pfl_lm.finetune import finetune

    data = {"data.path": str(make(tmp_path)), "data.split_column": None, "data.group_column": group}
    result = finetune(load_recipe(tiny_recipe(tmp_path, **data)))

    assert [client.client for client in result.clients] == list(CLIENTS)
    for client in CLIENTS:
        assert (result.folder / "adapters" / client / "adapter_model.safetensors").is_file()

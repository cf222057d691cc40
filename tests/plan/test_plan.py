"""A plan against the run it is of: the same files, bytes, steps; no weights, and no traces."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import pfl_lm.plan.plan
from pfl_lm.errors import DataError, ModelError
from pfl_lm.finetune import finetune
from pfl_lm.methods import METHODS
from pfl_lm.plan import Plan, make_plan
from pfl_lm.preflight import check_recipe
from tests.tiny import client_rows, tiny_model, tiny_recipe, write_jsonl


def planned(folder: Path, **changes: Any) -> Plan:
    folder.mkdir(parents=True, exist_ok=True)
    checked = check_recipe(tiny_recipe(folder, **changes))
    return make_plan(checked.loaded, checked.clients)


def files_in(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def tensors_in(content: bytes) -> int:
    """Return the bytes of a safetensors file without its header."""
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize(
    ("method", "fraction"),
    [*((name, 1.0) for name in METHODS), *((name, 0.1) for name in ("pflalign", "local"))],
)
def test_the_run_is_as_planned(tmp_path: Path, method: str, fraction: float) -> None:
    changes = {"method.name": method, "federation.fraction_train": fraction}
    plan = planned(tmp_path, **changes)

    folder = finetune(check_recipe(tmp_path / "recipe.yaml").loaded).folder

    files = files_in(folder)
    assert sorted(plan.disk.files) == sorted(files)
    tensors = {n: tensors_in(c) for n, c in files.items() if n.endswith(".safetensors")}
    assert plan.disk.at_end == sum(tensors.values()) <= plan.disk.at_most
    for name in files:
        if name.startswith("clients/"):
            held = load_file(folder / name)
            assert plan.traffic.state == {key: 4 * each.numel() for key, each in held.items()}
    assert 4 * plan.layout.d == tensors["adapters/bob/adapter_model.safetensors"]
    assert plan.traffic.server == tensors["server/state-2.safetensors"]
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        turns = ledger.execute("SELECT bytes_up, bytes_down, steps FROM turns").fetchall()
        cohorts = ledger.execute("SELECT count(*) FROM cohorts GROUP BY round").fetchall()
        clients = ledger.execute(
            "SELECT client, slug, n_train, n_validation, n_test FROM clients ORDER BY client"
        ).fetchall()
    assert {turn[:2] for turn in turns} == {(up, plan.traffic.down) for up in plan.traffic.ups}
    assert plan.steps == sum(turn[2] for turn in turns)
    assert [size for (size,) in cohorts] == list(plan.in_round)
    assert clients == [(c.id, c.id, c.train, c.validation, c.test) for c in plan.clients]
    scored = json.loads(files["adapters.json"])["clients"]["bob"]["scores"]["validation"]
    assert {*plan.traffic.candidates, "base"} == scored.keys()


def test_the_most_on_disk_is_while_a_round_goes_on(tmp_path: Path) -> None:
    """Three clients' states of four vectors twice, their uploads, and two of the server's."""
    plan = planned(tmp_path)
    one = 4 * plan.layout.d
    assert plan.disk.at_most == one * (3 * (4 + 4 + 1) + 2)
    assert plan.disk.at_end == one * (3 * (4 + 1) + 1 + 1)


def test_a_method_that_sends_one_factor_after_the_other_is_counted_round_by_round(
    tmp_path: Path,
) -> None:
    """On the tiny backbone A is larger than B, since v_proj is narrower than its input."""
    plan = planned(tmp_path, **{"method.name": "rolora"})
    sizes = {
        f: sum(4 * (e.stop - e.start) for e in plan.layout.entries if e.factor == f) for f in "AB"
    }
    assert sizes["A"] > sizes["B"]
    assert plan.traffic.ups == (sizes["B"], sizes["A"])
    assert (plan.traffic.up, plan.traffic.down) == (sizes["A"], sizes["A"] + sizes["B"])
    once = planned(tmp_path, **{"method.name": "rolora", "federation.rounds": 1})
    assert once.traffic.ups == (sizes["B"],)


def test_clients_are_counted_as_the_run_counts_them(tmp_path: Path) -> None:
    rows = client_rows(["alice"], n_rows=8)
    rows[0]["completion"] += " And so on" * 20
    rows[1]["prompt"] += " and so on" * 40
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    changes = {
        "training.max_steps": None,
        "training.local_epochs": 3,
        "data.validation_fraction": 0.2,
    }
    plan = planned(tmp_path, **{"data.path": data, **changes})
    [alice] = plan.clients
    assert (alice.train + alice.validation, alice.test) == (5, 2)
    assert (alice.cut, alice.dropped) == (1, 1)
    assert alice.steps == 3 * -(-alice.train // 2)
    assert plan.steps == 2 * alice.steps


def test_no_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def loaded(*given: object, **options: object) -> None:
        pytest.fail("weights were loaded")

    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder)
    for weights in folder.glob("*.safetensors"):
        weights.write_bytes(b"not weights")  # whoever opens them will say so
    whole = planned(tmp_path / "whole")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    before = files_in(tmp_path)

    plan = planned(tmp_path / "there", **{"backbone.model_name_or_path": str(folder)})

    new = files_in(tmp_path).keys() - before.keys()
    assert new == {"there/recipe.yaml", "there/clients.jsonl"}  # the test's own
    assert (plan.layout, plan.parameters) == (whole.layout, whole.parameters)
    assert (plan.disk, plan.traffic) == (whole.disk, whole.traffic)


def test_a_file_of_another_precision_lies_beside_the_weights_while_it_is_read(
    tmp_path: Path,
) -> None:
    """Of the same precision, what is mapped of it becomes the weights."""
    same = planned(tmp_path).memory
    half = planned(tmp_path, **{"backbone.dtype": "bfloat16"}).memory
    assert same is not None
    assert half is not None
    assert (same.weights, same.file) == (4 * 91_456, 0)
    assert (half.weights, half.file) == (2 * 91_456, 4 * 91_456)


@pytest.mark.parametrize(
    ("method", "vectors"),
    [("pflalign", 3 + 8 + 4 + 1 + 5 * 4 + 3), ("fedavg", 3 + 2 + 8 + 3 + 1 + 5 + 3)],
)
def test_vectors_are_counted_by_hand(tmp_path: Path, method: str, vectors: int) -> None:
    """One server, three uploads; pFLAlign on SGD has four vectors of state, fedavg on AdamW one."""
    optimizer = {"pflalign": "sgd", "fedavg": "adamw"}[method]
    plan = planned(tmp_path, **{"method.name": method, "training.optimizer": optimizer})
    assert plan.memory is not None
    assert plan.memory.vectors == vectors * 4 * plan.layout.d * 5 // 4


def test_what_a_run_would_refuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'c_attn' not in this backbone"):
        planned(tmp_path, **{"adapter.target_modules": ["c_attn"]})
    with pytest.raises(ModelError, match=r"\[2\] not in this backbone"):
        planned(tmp_path, **{"adapter.layers_to_transform": [2]})
    with pytest.raises(DataError, match="keep a supervised token at max_length 8"):
        planned(tmp_path, **{"data.max_length": 8})


def test_a_folder_that_is_no_model_is_explained(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError) as caught:
        planned(tmp_path, **{"backbone.model_name_or_path": str(folder)})
    assert caught.value.message.startswith(f"backbone {folder}: cannot be loaded: ")
    assert caught.value.hint is not None


def test_an_id_that_is_too_long_for_a_folder_is_explained(tmp_path: Path) -> None:
    name = "x" * 300
    with pytest.raises(ModelError, match=r"backbone xxx.*: cannot be loaded: "):
        planned(tmp_path, **{"backbone.model_name_or_path": name})


def test_a_hint_is_safe_to_type(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        planned(tmp_path, **{"backbone.model_name_or_path": "x/y; touch z"})
    assert "run `hf download 'x/y; touch z'` once" in str(caught.value.hint)


def test_the_first_few_of_many_wrong_names_are_said(tmp_path: Path) -> None:
    names = [f"m{i}" for i in range(3000)]
    with pytest.raises(ModelError, match="'m11' and 2988 more not in this backbone") as caught:
        planned(tmp_path, **{"adapter.target_modules": names})
    assert len(caught.value.message) < 300
    with pytest.raises(ModelError, match=r"\[2, .*, 13 and 88 more\] not in this backbone"):
        planned(tmp_path, **{"adapter.layers_to_transform": list(range(102))})


def test_the_rate_may_still_be_open(tmp_path: Path) -> None:
    assert planned(tmp_path, **{"training.learning_rate": "auto"}).steps == 12


def test_a_backbone_that_asks_for_numbers_is_planned_without_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asks(*given: object) -> None:
        raise RuntimeError("no numbers here\nand more")

    monkeypatch.setattr(pfl_lm.plan.plan, "rehearse", asks)
    checked = check_recipe(tiny_recipe(tmp_path))
    said: list[str] = []
    plan = make_plan(checked.loaded, checked.clients, said.append)
    assert plan.memory is None
    assert said == ["no estimate of memory: no numbers here"]
    assert plan.steps == 12


def test_the_largest_batches_are_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of training: two of the longest client; of scoring: its one long test row, cut."""
    seen: list[Any] = []
    real = pfl_lm.plan.plan.rehearse
    monkeypatch.setattr(
        pfl_lm.plan.plan, "rehearse", lambda *given: (seen.append(given), real(*given))[1]
    )
    rows = client_rows(n_rows=8)
    next(r for r in rows if r["split"] == "test")["completion"] += " on" * 500
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    planned(tmp_path, **{"data.path": data})
    [(_, train, score, device, _)] = seen
    assert (train.rows, device.type) == (2, "cpu")
    assert 20 < train.tokens < 128
    assert (score.rows, score.tokens) == (2, 128)


def test_what_memory_cannot_remember_is_planned_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = {"adapter.layers_to_transform": [1]}
    whole = planned(tmp_path / "whole", **top)
    assert whole.memory is not None
    assert whole.memory.trunk > 5000
    assert whole.spilled == 0
    monkeypatch.setattr(pfl_lm.plan.plan, "MOST_BYTES", 5000)
    for value, spilled in (("auto", whole.memory.trunk - 5000), ("memory", 0), ("off", 0)):
        found = planned(tmp_path / value, **top, **{"runtime.trunk_cache": value})
        assert found.memory is not None
        assert found.memory.trunk == (0 if value == "off" else 5000)
        assert found.spilled == spilled

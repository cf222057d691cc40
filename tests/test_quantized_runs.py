"""Whole runs on a backbone in 4 or 8 bits: resumed, exported, loaded in full precision."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pfl_lm.errors import PflError, RecipeError, RunFolderError
from pfl_lm.finetune import finetune
from pfl_lm.plan import make_plan
from pfl_lm.preflight import check_recipe
from pfl_lm.recipe import load_recipe
from pfl_lm.resume import refuse_differences, run_recipe
from tests.interruptions import go_on, killed_at, stopped, whole
from tests.runs import ask, run, scored
from tests.same import check_same, files_in
from tests.tiny import client_rows, tiny_model, tiny_recipe

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"backbone.quantization": "nf4", "backbone.bnb_4bit_use_double_quant": True},
    "int8": {"backbone.quantization": "int8"},
}
METHOD = {"method.name": "ditto", "training.optimizer": "adamw", "training.learning_rate": 0.01}
TOP = {"adapter.layers_to_transform": [1]}  # layer 0 is remembered


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param] | METHOD | TOP


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, kind: dict[str, Any]) -> tuple[Path, int]:
    """A run, and how many commits it makes. Read it only."""
    with killed_at(10**6) as seen:
        folder = whole(tmp_path_factory.mktemp("quantized"), **kind)
    return folder, seen[0]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in full precision. Read it only."""
    return whole(tmp_path_factory.mktemp("full"), **METHOD, **TOP)


def losses(folder: Path) -> dict[tuple[str, ...], float]:
    keys = ("round", "client", "split", "candidate")
    rows = [row for row in scored(folder) if row["metric"] == "nll"]
    return {tuple(row[key] for key in keys): float(row["value"]) for row in rows}


def test_losses_are_near_those_of_full_precision(finished: tuple[Path, int], full: Path) -> None:
    """Within 0.5 %, in every round, for every client and candidate; and clients have learned."""
    found, wanted = losses(finished[0]), losses(full)
    assert found.keys() == wanted.keys()
    assert found != wanted
    assert all(abs(found[key] / wanted[key] - 1) < 5e-3 for key in found)
    last = {key[1:]: value for key, value in found.items()}
    for client in ("alice", "bob", "carol"):
        assert last[client, "test", "personal"] < last[client, "test", "base"] - 0.02


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_stopped_anywhere_it_ends_the_same_to_the_bit(
    tmp_path: Path, finished: tuple[Path, int], kind: dict[str, Any], share: float
) -> None:
    expected, n_commits = finished
    folder = stopped(tmp_path, 1 + round(share * (n_commits - 1)), **kind)
    check_same(go_on(folder), expected)


def test_without_its_trunk_it_ends_nearly_the_same(
    tmp_path: Path, finished: tuple[Path, int], kind: dict[str, Any]
) -> None:
    found = losses(whole(tmp_path, **kind, **{"runtime.trunk_cache": "off"}))
    wanted = losses(finished[0])
    assert all(abs(found[key] / wanted[key] - 1) < 1e-4 for key in wanted)


def test_checkpointed_it_ends_the_same_to_the_bit(
    tmp_path: Path, finished: tuple[Path, int], kind: dict[str, Any]
) -> None:
    folder = whole(tmp_path, **kind, **{"training.gradient_checkpointing": True})
    adapters = [
        {name: c for name, c in files_in(each).items() if name.endswith(".safetensors")}
        for each in (folder, finished[0])
    ]
    assert len(adapters[0]) >= 3
    assert adapters[0] == adapters[1]
    assert losses(folder) == losses(finished[0])


def test_it_is_another_run_than_one_in_full_precision(finished: tuple[Path, int]) -> None:
    folder = finished[0]
    stored = run_recipe(folder).recipe
    recipe = folder.parents[1] / "recipe.yaml"
    given = load_recipe(recipe, ["backbone.quantization=none", *_no_double(recipe)])
    with pytest.raises(
        RecipeError, match=r"backbone\.quantization: 'none', and the run began with"
    ):
        refuse_differences(stored, given)
    checkpointed = load_recipe(recipe, ["training.gradient_checkpointing=true"])
    refuse_differences(stored, checkpointed)  # which leaves every number alone


def _no_double(recipe: Path) -> list[str]:
    double = "bnb_4bit_use_double_quant" in recipe.read_text()
    return ["backbone.bnb_4bit_use_double_quant=false"] if double else []


def test_weights_that_quantize_otherwise_are_another_backbone(
    tmp_path: Path, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(tmp_path, 12, **kind)
    [(began,)] = ask(folder, "SELECT value FROM run WHERE key = 'backbone'")
    monkeypatch.setattr("pfl_lm.model.backbone.described", lambda options, dtype: "otherwise")
    with pytest.raises(RunFolderError, match="this run began on another backbone"):
        go_on(folder)
    assert len(began) == 64
    [(package,)] = ask(folder, "SELECT count(*) FROM run WHERE key = 'bitsandbytes'")
    assert package == 1


def test_adapters_load_on_the_base_in_full_precision(finished: tuple[Path, int]) -> None:
    """Through PEFT alone; its loss there is within 0.5 % of the one that was noted."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished[0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    noted = losses(folder)
    for client in ("alice", "bob", "carol"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folder / "adapters" / client)
        rows = [row for row in client_rows((client,)) if row["split"] == "test"]
        nll, n = 0.0, 0
        for row in rows:
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
            prompt = tokenizer.apply_chat_template(
                messages[:1], add_generation_prompt=True, tokenize=False
            )
            whole_text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(whole_text.removesuffix("\n"), return_tensors="pt").input_ids
            labels = ids.clone()
            labels[:, : len(tokenizer(prompt).input_ids)] = -100
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            wanted = labels[0, 1:]
            nll += float(torch.nn.functional.cross_entropy(logits[0, :-1], wanted, reduction="sum"))
            n += int((wanted != -100).sum())
        assert nll / n == pytest.approx(noted["2", client, "test", "personal"], rel=5e-3)
        merged = model.merge_and_unload()  # which a base in full precision bears
        with torch.no_grad():
            again = merged(input_ids=ids).logits
        torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)


def test_the_card_says_what_it_was_trained_on(finished: tuple[Path, int], full: Path) -> None:
    name = "int8" if "int8" in (finished[0] / "recipe.resolved.yaml").read_text() else "nf4"
    card = (finished[0] / "adapters" / "alice" / "README.md").read_text()
    assert f"frozen, {name} by bitsandbytes and float32" in card
    assert (
        f"- It was trained and scored on the base model quantized to {name}; the code above loads "
        "it in full precision, where losses differ a little. To merge, load it so and call "
        "`model.merge_and_unload()`: quantized weights would round part of the adapter away.\n"
    ) in card
    assert "bitsandbytes 0." in card
    plain = (full / "adapters" / "alice" / "README.md").read_text()
    assert "frozen, float32 |" in plain
    assert "bitsandbytes" not in plain


def test_a_plan_knows_its_bytes(tmp_path: Path, kind: dict[str, Any]) -> None:
    plans = []
    for name, changes in (("quantized", kind), ("full", METHOD | TOP)):
        (tmp_path / name).mkdir()
        checked = check_recipe(tiny_recipe(tmp_path / name, **changes))
        plans.append(make_plan(checked.loaded, checked.clients))
    quantized, plain = plans
    assert quantized.memory is not None
    assert plain.memory is not None
    assert quantized.parameters == plain.parameters
    assert quantized.memory.weights == quantized.weights < 0.5 * plain.weights
    assert quantized.memory.unpacked == 4 * 64 * 128
    assert quantized.memory.file == 4 * plain.parameters  # its file is read whole all the same
    assert (plain.memory.unpacked, plain.memory.file) == (0, 0)
    assert quantized.memory.blocks == plain.memory.blocks


def test_checkpointing_lowers_the_estimate(tmp_path: Path) -> None:
    kept = []
    for given in (False, True):
        (tmp_path / str(given)).mkdir()
        changes = {"training.gradient_checkpointing": given}
        checked = check_recipe(tiny_recipe(tmp_path / str(given), **changes))
        memory = make_plan(checked.loaded, checked.clients).memory
        assert memory is not None
        kept.append(memory.blocks.train.small)
    assert kept[1] < 0.8 * kept[0]


def test_a_gguf_file_is_quantized_from_its_converted_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversion itself is tested with the real file; here its folder is there already."""
    package = tmp_path / "site" / "weights_of_mine"
    package.mkdir(parents=True)
    (package / "tiny.gguf").touch()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr("pfl_lm.model.backbone.converted_folder", lambda gguf: tiny_model())
    monkeypatch.setattr("pfl_lm.preflight.converted_folder", lambda gguf: tiny_model())
    source = {"backbone.package": "weights_of_mine", "backbone.gguf_file": "tiny.gguf"}
    changes = KINDS["nf4"] | source | {"federation.rounds": 1}
    found = run(tmp_path / "gguf", **changes)
    wanted = run(tmp_path / "folder", **KINDS["nf4"], **{"federation.rounds": 1})
    assert losses(found.folder) == losses(wanted.folder)


@pytest.mark.parametrize("more", [[], ["training.max_steps=0"]])
def test_without_bitsandbytes_it_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """Also if the recipe has another fault: all problems at once."""
    recipe = tiny_recipe(tmp_path)
    monkeypatch.setattr("pfl_lm.recipe.checks.find_spec", lambda name: None)
    with pytest.raises(PflError) as caught:
        check_recipe(recipe, ["backbone.quantization=int8", *more])
    assert (
        "backbone.quantization: int8 needs bitsandbytes, which is not installed here\n"
        '  hint: pip install "pfl-lm[quantization]"'
    ) in str(caught.value)
    check_recipe(recipe)


def test_without_bitsandbytes_a_run_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(tmp_path, 12, **KINDS["int8"])
    monkeypatch.setattr("pfl_lm.recipe.checks.find_spec", lambda name: None)
    with pytest.raises(PflError, match="int8 needs bitsandbytes, which is not installed here"):
        finetune(run_recipe(folder), resume=True)


def test_looking_for_bitsandbytes_does_not_import_it(tmp_path: Path) -> None:
    known = "bitsandbytes" in sys.modules
    check_recipe(tiny_recipe(tmp_path, **KINDS["nf4"]))
    assert ("bitsandbytes" in sys.modules) == known

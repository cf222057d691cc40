"""Exported folders in a stranger's hands: stock PEFT and transformers, nothing of ours."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pfl_lm.errors import ExportError
from pfl_lm.export.folders import export_adapter
from pfl_lm.layout import AdapterLayout
from tests.tiny import tiny_model
from tests.world import World, make_world

IDS = torch.arange(5, 45).view(2, 20)
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def plain_backbone() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def test_stock_peft_and_transformers_load_what_was_exported(world: World, tmp_path: Path) -> None:
    vector = world.vector()
    digest = export_adapter(world.adapter, vector, world.backbone, tmp_path)
    world.adapter.write(vector)
    wanted = logits(world.adapter.model)

    by_peft = PeftModel.from_pretrained(plain_backbone(), tmp_path)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()

    assert torch.equal(logits(by_peft), wanted)
    assert torch.equal(logits(by_transformers), wanted)
    assert not torch.allclose(logits(plain_backbone()), wanted, atol=1e-3)
    content = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()


def test_the_resident_adapter_ends_as_what_was_exported(world: World, tmp_path: Path) -> None:
    world.adapter.write(world.start)
    export_adapter(world.adapter, world.vector(seed=9), world.backbone, tmp_path)
    assert torch.equal(world.adapter.read(), world.vector(seed=9))


def test_an_adapter_without_effect_is_the_backbone(world: World, tmp_path: Path) -> None:
    vector = world.adapter.layout.without_effect(world.vector())
    export_adapter(world.adapter, vector, world.backbone, tmp_path)

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    second = [tensor for key, tensor in tensors.items() if key.endswith("lora_B.weight")]
    assert len(second) == len(tensors) / 2
    assert all(tensor.count_nonzero() == 0 for tensor in second)
    exported = PeftModel.from_pretrained(plain_backbone(), tmp_path)
    assert torch.equal(logits(exported), logits(plain_backbone()))


def test_tensors_are_fp32_under_keys_without_an_adapters_name(world: World, tmp_path: Path) -> None:
    export_adapter(world.adapter, world.vector(), world.backbone, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tensors) == sorted(
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{factor}.weight"
        for layer in range(2)
        for name in ("q_proj", "v_proj")
        for factor in "AB"
    )
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert sum(tensor.numel() for tensor in tensors.values()) == len(world.start)


def test_the_config_is_sorted_and_says_what_it_belongs_to(tmp_path: Path) -> None:
    contents = set()
    for targets in (SEVEN, SEVEN[::-1]):
        world = make_world(target_modules=targets, r=2)
        export_adapter(world.adapter, world.start, world.backbone, tmp_path)
        contents.add((tmp_path / "adapter_config.json").read_bytes())
    [content] = contents
    config = json.loads(content)
    assert list(config) == sorted(config)
    assert config["target_modules"] == sorted(SEVEN)
    assert config["base_model_name_or_path"] == str(tiny_model())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (2, 16, True)


def test_the_base_is_named_as_the_backbone_is(world: World, tmp_path: Path) -> None:
    """A run on a package's weights names the model on the Hub that they are a copy of."""
    backbone = replace(world.backbone, name="org/tiny", revision="v1")
    export_adapter(world.adapter, world.start, backbone, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", "v1")


@pytest.mark.parametrize("fault", ["missing", "extra", "renamed", "other layer", "adapter name"])
def test_a_folder_with_other_tensors_is_refused(world: World, tmp_path: Path, fault: str) -> None:
    export_adapter(world.adapter, world.vector(), world.backbone, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[0]
    if fault == "extra":
        wrong = key.replace("q_proj", "o_proj")
        tensors[wrong] = torch.zeros(8, 64)
    else:
        tensor = tensors.pop(key)
        wrong = {
            "missing": key,
            "renamed": key.replace("self_attn", "attn"),
            "other layer": key.replace("layers.0", "layers.7"),
            "adapter name": key.replace(".weight", ".default.weight"),
        }[fault]
        if fault != "missing":
            tensors[wrong] = tensor
    save_file(tensors, path)

    with pytest.raises(ExportError, match="keys or shapes differ") as caught:
        world.adapter.reload(tmp_path)
    assert caught.value.message.startswith(f"{tmp_path}: PEFT does not read it back")
    assert wrong in caught.value.message


def test_a_tensor_of_another_shape_is_refused(world: World, tmp_path: Path) -> None:
    export_adapter(world.adapter, world.vector(), world.backbone, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[0]
    save_file({**tensors, key: torch.zeros(3, 64)}, path)

    with pytest.raises(ExportError, match=f"keys or shapes differ: .'{key}'"):
        world.adapter.reload(tmp_path)


def test_an_export_that_loses_a_bit_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = world.adapter.tensors

    def rounded(vector: Tensor, own: AdapterLayout | None = None) -> dict[str, Tensor]:
        return {key: tensor.bfloat16().float() for key, tensor in tensors(vector, own).items()}

    monkeypatch.setattr(world.adapter, "tensors", rounded)
    with pytest.raises(ExportError, match="reads back with other numbers than were written"):
        export_adapter(world.adapter, world.vector(), world.backbone, tmp_path)

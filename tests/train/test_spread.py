"""A backbone on two devices: the adapter stays one vector, its factors go where inputs are.

The devices are the CPU and PyTorch's meta device, on fake tensors, which have a device and no
numbers: an operation on tensors of two devices is an error there, as it is on two GPUs. Accelerate
moves what layers are given by the hooks that it would use on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.big_modeling import attach_align_device_hook_on_blocks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pfl_lm.errors import ModelError
from pfl_lm.federation.fleet.start import refuse_spread_over_ranks
from pfl_lm.model import backbone as backbone_module
from pfl_lm.model import head
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import Backbone, load_backbone
from pfl_lm.recipe import AdapterOptions, BackboneOptions
from pfl_lm.train.loss import error_by_row, nll_by_row, nll_sum
from tests.tiny import tiny_model
from tests.world import make_world

HERE, THERE = "cpu", "meta"


def places(head: str) -> dict[str, str]:
    """Return where each part of the model lies; its head may be tied to the embeddings."""
    first = {"model.embed_tokens": HERE, "model.rotary_emb": HERE, "model.layers.0": HERE}
    return {**first, "model.layers.1": THERE, "model.norm": THERE, "lm_head": head}


def spread(tied: bool) -> Backbone:
    """Build the tiny backbone with its second layer elsewhere, as Accelerate does it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_model())
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    where = places(HERE if tied else THERE)
    made: dict[Tensor, Tensor] = {}
    for name, module in model.named_modules():
        home = next((each for part, each in where.items() if name.startswith(part)), HERE)
        for key, own in list(module.named_parameters(recurse=False)):
            if own not in made:
                empty = torch.empty(own.shape, dtype=own.dtype, device=home)
                made[own] = nn.Parameter(empty, requires_grad=False)
            setattr(module, key, made[own])
        for key, own in list(module.named_buffers(recurse=False)):
            setattr(module, key, torch.empty(own.shape, dtype=own.dtype, device=home))
    attach_align_device_hook_on_blocks(
        model, execution_device=where, offload=dict.fromkeys(where, False)
    )
    model.eval()
    return Backbone(model, None, "tiny", None)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors; PEFT's own moves of new factors are left out, which they cannot do."""
    tiny_model()
    monkeypatch.setattr(nn.Module, "to", lambda module, *given, **named: module)
    with FakeTensorMode():
        yield


def batch() -> dict[str, Any]:
    ids = torch.ones(2, 10, dtype=torch.int64)
    return {
        "input_ids": ids,
        "attention_mask": ids,
        "labels": ids,
        "positions": ids.new_zeros(12),
    }


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_a_step_and_a_score_over_two_devices(
    tied: bool, in_parts: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_parts:
        monkeypatch.setattr(head, "MOST_LOGITS", 3 * 272)
    backbone = spread(tied)
    assert backbone.is_spread
    assert backbone.device == torch.device(HERE)
    adapter = Adapter(backbone, AdapterOptions(), seed=0, gradient_checkpointing=checkpointing)
    assert {each.device.type for each in (adapter.weights, adapter.grads)} == {HERE}
    second = backbone.model.model.layers[1].self_attn.q_proj
    assert second.base_layer.weight.device.type == THERE
    loss = nll_sum(adapter.forward, batch())
    assert loss.device.type == HERE
    loss.backward()  # type: ignore[no-untyped-call]
    storage = adapter.grads.untyped_storage()
    for parameter in adapter.parameters():
        assert parameter.grad is not None
        assert parameter.grad.untyped_storage()._cdata == storage._cdata
    with torch.no_grad():
        assert nll_by_row(adapter.forward, batch()).device.type == HERE
        assert error_by_row(adapter.forward, batch()).device.type == HERE


@pytest.mark.usefixtures("fake")
def test_the_forwards_of_others_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate calls layers through a forward of its own, which has to outlive an adapter's."""
    backbone = spread(tied=True)
    layers = backbone.model.model.layers
    before = [layer.__dict__["forward"] for layer in layers]
    adapter = Adapter(backbone, AdapterOptions(), seed=0, gradient_checkpointing=True)
    assert [layer.__dict__["forward"] for layer in layers] != before
    adapter.close()
    assert [layer.__dict__["forward"] for layer in layers] == before


def test_factors_that_go_to_their_input_give_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On one device, where going there is nothing; real numbers."""
    found = []
    for is_spread in (False, True):
        monkeypatch.setattr(Backbone, "is_spread", is_spread)
        world = make_world(lora_dropout=0.2)
        world.adapter.write(world.vector())
        found.append(world.trainer().train(world.vector(), steps=3))
    assert torch.equal(*found)


def options(**more: Any) -> BackboneOptions:
    source = {"model_name_or_path": str(tiny_model()), "device_map": "auto"}
    return BackboneOptions.model_validate(source | more)


def test_on_a_cpu_it_changes_nothing() -> None:
    plain = load_backbone(options(device_map=None), torch.device("cpu"))
    loaded = load_backbone(options(), torch.device("cpu"))
    assert not loaded.is_spread
    assert not hasattr(loaded.model, "_hf_hook")
    assert loaded.fingerprint == plain.fingerprint
    assert loaded.dtype == plain.dtype


@pytest.mark.parametrize("quantized", [False, True])
def test_on_gpus_accelerate_is_asked_to_spread_it(
    monkeypatch: pytest.MonkeyPatch, quantized: bool
) -> None:
    """What transformers is told, and what becomes of a model that has no room on GPUs."""
    import transformers

    told: dict[str, Any] = {}

    class Model(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.config = transformers.LlamaConfig()
            self.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "disk"}

    def load(source: str, **named: Any) -> nn.Module:
        told.update(named)
        return Model()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    given = options(dtype="float32", quantization="nf4" if quantized else "none")
    with pytest.raises(ModelError) as caught:
        load_backbone(given, torch.device("cuda"))
    assert told["device_map"] == "auto"
    assert (told["quantization_config"] is not None) == quantized
    assert str(caught.value) == (
        f"backbone {tiny_model()}: does not fit on the GPUs of this machine; 2 of its 3 parts, "
        "from model.layers.1 on, would not lie on one\n  hint: backbone.quantization=nf4 takes a "
        "quarter of bfloat16's memory; or use more GPUs"
    )
    backbone_module._refuse_beyond_gpus({"model.layers.0": 0, "model.layers.1": 1}, "tiny")


class Ranks:
    def __init__(self, n: int) -> None:
        self.num_processes = n


def test_several_ranks_are_refused() -> None:
    one, two = Ranks(1), Ranks(2)
    refuse_spread_over_ranks(options(), one)  # type: ignore[arg-type]
    refuse_spread_over_ranks(options(device_map=None), two)  # type: ignore[arg-type]
    with pytest.raises(Exception, match=r"^backbone\.device_map: ") as caught:
        refuse_spread_over_ranks(options(), two)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "backbone.device_map: auto spreads one backbone over all GPUs, and 2 processes each want "
        "one of their own\n  hint: start a single process, without torchrun; or leave "
        "backbone.device_map out"
    )

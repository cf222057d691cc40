"""A backbone in 4 or 8 bits: near the full one, trained as it is scored, never changed."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pfl_lm.data.batches import collate
from pfl_lm.errors import ModelError
from pfl_lm.model import head
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import Backbone, load_backbone
from pfl_lm.model.outline import find_source, outline_backbone
from pfl_lm.model.quantized import quantized_layers
from pfl_lm.model.states import TrunkStates
from pfl_lm.recipe import AdapterOptions, BackboneOptions
from pfl_lm.train.loss import nll_sum
from tests.tiny import save_model, tiny_model
from tests.world import World, make_world

CPU = torch.device("cpu")
NF4 = {"quantization": "nf4"}
DOUBLE = {"quantization": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"quantization": "int8"}
KINDS = [pytest.param(kind, id="-".join(map(str, kind.values()))) for kind in (NF4, DOUBLE, INT8)]
FULL: dict[str, Any] = {}


def options(kind: dict[str, Any], dtype: str = "float32", **more: Any) -> BackboneOptions:
    source = {"model_name_or_path": str(tiny_model()), "dtype": dtype}
    return BackboneOptions.model_validate(source | kind | more)


def loaded(kind: dict[str, Any], dtype: str = "float32", **more: Any) -> Backbone:
    return load_backbone(options(kind, dtype, **more), CPU)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def adapted(backbone: Backbone, layers: list[int] | None = None, **more: Any) -> Adapter:
    """Return an adapter that has an effect, with dropout."""
    options = {"lora_dropout": 0.1, "layers_to_transform": layers}
    made = Adapter(backbone, AdapterOptions.model_validate(options), seed=11, **more)
    generator = torch.Generator().manual_seed(1)
    made.write(made.weights + 0.05 * torch.randn(len(made.weights), generator=generator))
    return made


def trained(adapter: Adapter, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of a training step, the same dropout every time."""
    adapter.model.train()
    adapter.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = nll_sum(adapter.forward, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    adapter.model.eval()
    return loss.detach(), adapter.grads.clone()


@torch.no_grad()
def scored(adapter: Adapter, batch: dict[str, Any]) -> Tensor:
    adapter.model.eval()
    return nll_sum(adapter.forward, batch)


def stored(backbone: Backbone) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in backbone.model.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_changes_neither_gradients_nor_weights(
    world: World, kind: dict[str, Any], dtype: str
) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes by itself gives gradients of zero afterwards."""
    backbone = loaded(kind, dtype)
    before = stored(backbone)
    adapter = adapted(backbone)
    assert adapter.weights.dtype == adapter.grads.dtype == torch.float32
    batch = collate(world.examples()[:4], 0)
    first = trained(adapter, batch)
    score = scored(adapter, batch)
    again = trained(adapter, batch)
    assert float(first[1].norm()) > 0
    assert torch.equal(again[1], first[1])
    assert torch.equal(again[0], first[0])
    assert torch.equal(scored(adapter, batch), score)
    adapter.close()
    after = stored(backbone)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


def test_a_cpu_that_would_repack_is_among_those_tested() -> None:
    """Where it is not, the test above cannot fail; this says so."""
    from bitsandbytes.nn import Linear4bit

    if not Linear4bit(64, 64).support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16: bitsandbytes repacks nothing here")
    layers = quantized_layers(loaded(NF4).model)
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_scored_is_what_is_trained(world: World, kind: dict[str, Any]) -> None:
    """In eval mode a CPU would round the inputs of int8 layers too."""
    backbone = loaded(kind)
    batch = collate(world.examples()[:4], 0)
    with torch.no_grad():
        backbone.model.train()
        training = nll_sum(backbone.model, batch)
        backbone.model.eval()
        scoring = nll_sum(backbone.model, batch)
    assert torch.equal(training, scoring)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_near_those_of_full_precision(
    world: World, kind: dict[str, Any]
) -> None:
    """Within 0.2 % for losses; gradients point the same way, int8's closer than those of nf4."""
    batch = collate(world.examples()[:4], 0)
    found = []
    for each in (FULL, kind):
        adapter = adapted(loaded(each))
        found.append(trained(adapter, batch))
    (loss, grads), (other, others) = found
    assert not torch.equal(loss, other)
    torch.testing.assert_close(other, loss, rtol=2e-3, atol=0)
    cosine = float(torch.nn.functional.cosine_similarity(grads, others, dim=0))
    assert cosine > (0.999 if kind is INT8 else 0.95)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trunk_and_the_parts_of_the_head_go_on_to_work(
    world: World, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = loaded(kind)
    batch = collate(world.examples()[:4], 0)
    plain = adapted(backbone, [1])
    wanted = [*trained(plain, batch), scored(plain, batch)]
    plain.close()
    monkeypatch.setattr(head, "MOST_LOGITS", 7 * len(backbone.tokenizer))  # seven positions
    adapter = adapted(backbone, [1], trunk=TrunkStates())
    assert adapter.forward is not adapter.model
    assert head.top_of(adapter.forward, *_asked(batch)) is not None
    for found, due in zip([*trained(adapter, batch), scored(adapter, batch)], wanted, strict=True):
        torch.testing.assert_close(found, due, rtol=2e-5, atol=2e-5 * float(due.abs().max()))
    adapter.close()


def _asked(batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return {**inputs, "use_cache": False}, batch["positions"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [FULL, *KINDS])
def test_planned_bytes_are_those_in_memory(
    tmp_path: Path, kind: dict[str, Any], dtype: str, tied: bool
) -> None:
    """To the byte: packed matrices, their scales, the scales' scales, the lists of values."""
    folder = tiny_model() if tied else untied(tmp_path)
    given = options(kind, dtype, model_name_or_path=str(folder))
    outline = outline_backbone(find_source(given), given, getattr(torch, dtype), CPU)
    backbone = load_backbone(given, CPU)
    held: dict[int, Tensor] = {id(each): each for each in backbone.model.parameters()}
    for layer in quantized_layers(backbone.model):
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            held |= {
                id(layer): layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
            }
            continue
        nested = state.state2
        scales = [state.absmax, state.code]
        scales += [nested.absmax, nested.code, state.offset] if nested is not None else []
        held |= {id(each): each for each in scales}
    assert outline.weights == sum(each.numel() * each.dtype.itemsize for each in held.values())
    assert outline.unpacked == (0 if kind == FULL else 64 * 128 * backbone.dtype.itemsize)


def untied(folder: Path) -> Path:
    """Return a model whose head is a matrix of its own, which stays as it is."""
    from transformers import AutoModelForCausalLM

    save_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    model.save_pretrained(folder)
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return folder


def test_a_fingerprint_tells_how_a_backbone_is_kept() -> None:
    kinds = (FULL, NF4, DOUBLE, NF4 | {"bnb_4bit_compute_dtype": "bfloat16"}, INT8)
    prints = [loaded(kind).fingerprint for kind in kinds]
    assert len(set(prints)) == len(prints)
    assert [loaded(kind).fingerprint for kind in kinds] == prints
    same = NF4 | {"bnb_4bit_compute_dtype": "float32"}  # as its dtype is anyway
    assert loaded(same).fingerprint == prints[1]


def test_the_type_of_a_quantized_backbone_is_that_of_its_embeddings() -> None:
    backbone = loaded(NF4, "bfloat16")
    assert backbone.dtype == torch.bfloat16
    assert {layer.compute_dtype for layer in quantized_layers(backbone.model)} == {torch.bfloat16}
    other = loaded(NF4 | {"bnb_4bit_compute_dtype": "float32"}, "bfloat16")
    assert {layer.compute_dtype for layer in quantized_layers(other.model)} == {torch.float32}


def test_bitsandbytes_is_quiet(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It would warn of every product of 8 bits in eval mode, or on a GPU."""
    caplog.set_level(logging.WARNING)
    backbone = loaded(INT8)
    for layer in quantized_layers(backbone.model):
        del layer.train  # as on a GPU, where inputs are rounded
    backbone.model.eval()
    with torch.no_grad():
        nll_sum(backbone.model, collate(world.examples()[:2], 0))
    assert [record for record in caplog.records if record.name.startswith("bitsandbytes")] == []


@pytest.mark.parametrize("kind", [NF4, INT8])
def test_other_devices_are_refused(kind: dict[str, Any]) -> None:
    mps = torch.device("mps")
    given = options(kind)
    for load in (
        lambda: load_backbone(given, mps),
        lambda: outline_backbone(find_source(given), given, torch.float32, mps),
    ):
        with pytest.raises(ModelError) as caught:
            load()
        assert str(caught.value) == (
            f"backbone.quantization: {kind['quantization']} is for GPUs of NVIDIA (cuda) and for "
            "CPUs; this run would be on mps\n  hint: leave backbone.quantization out; or run on "
            "the CPU: ACCELERATE_USE_CPU=true"
        )


@pytest.mark.parametrize("kind", [FULL, NF4])
@pytest.mark.parametrize(
    "written", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_8bit": True}]
)
def test_weights_that_are_stored_quantized_are_refused(
    tmp_path: Path, kind: dict[str, Any], written: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "stored"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": written}))
    given = options(kind, model_name_or_path=str(folder))
    for load in (
        lambda: load_backbone(given, CPU),
        lambda: outline_backbone(find_source(given), given, torch.float32, CPU),
    ):
        with pytest.raises(ModelError) as caught:
            load()
        assert str(caught.value) == (
            f"backbone {folder}: its weights are stored quantized by bitsandbytes; pfl-lm "
            "quantizes while it loads, so that adapters belong to the model of full precision\n"
            "  hint: name the model that it was made from, and set backbone.quantization"
        )

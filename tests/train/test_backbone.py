"""Precision and attention of the frozen backbone, and how far down a gradient goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pfl_lm.data.batches import collate
from pfl_lm.errors import ModelError
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import load_backbone, pick_dtype
from pfl_lm.model.outline import find_source, outline_backbone
from pfl_lm.recipe import BackboneOptions
from pfl_lm.train.loss import nll_sum
from tests.tiny import tiny_model
from tests.world import World, make_world

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx", "mkldnn", "wanted"),
    [
        ("x86_64", True, False, True, torch.bfloat16),
        ("x86_64", False, True, True, torch.bfloat16),
        ("AMD64", True, True, True, torch.bfloat16),
        ("x86_64", False, False, True, torch.float32),  # AVX512 alone: mkldnn emulates it
        ("x86_64", False, False, False, torch.float32),
        ("aarch64", False, False, True, torch.bfloat16),
        ("aarch64", False, False, False, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_a_cpu_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    avx512_bf16: bool,
    amx: bool,
    mkldnn: bool,
    wanted: torch.dtype,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: mkldnn)
    assert pick_dtype("auto", CPU) == wanted
    assert pick_dtype("float16", CPU) == torch.float16


@pytest.mark.parametrize("native", [True, False])
def test_auto_on_a_gpu_does_not_count_emulation(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    wanted = torch.bfloat16 if native else torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == wanted


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux for the CPU's flags")
@pytest.mark.skipif(torch.backends.mkldnn.is_available() is False, reason="no mkldnn")
def test_this_cpu_is_taken_for_what_it_is() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    if not flags:
        pytest.skip("no x86")
    native = bool(flags & {"avx512_bf16", "amx_bf16", "amx_tile"})
    assert (pick_dtype("auto", CPU) == torch.bfloat16) == native


def options(**more: Any) -> BackboneOptions:
    source = {"model_name_or_path": str(tiny_model()), "dtype": "float32"}
    return BackboneOptions.model_validate(source | more)


@pytest.mark.parametrize(("asked", "used"), [(None, "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_attention_is_pytorchs_own_unless_another_is_asked_for(
    asked: str | None, used: str
) -> None:
    given = options(attn_implementation=asked)
    assert load_backbone(given, CPU).model.config._attn_implementation == used
    outline = outline_backbone(find_source(given), given, torch.float32, CPU)
    assert outline.backbone.model.config._attn_implementation == used


def test_both_kinds_of_attention_come_to_the_same() -> None:
    found = []
    for kind in ("sdpa", "eager"):
        model = load_backbone(options(attn_implementation=kind), CPU).model
        ids = torch.arange(40).reshape(2, 20)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        with torch.no_grad():
            found.append(nll_sum(model, batch))
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_an_attention_that_is_not_installed_is_told() -> None:
    with pytest.raises(ModelError) as caught:
        load_backbone(options(attn_implementation="flash_attention_2"), CPU)
    assert "flash" in caught.value.message.lower()


# --- no gradient below the lowest adapter -----------------------------------------------------


def visited(world: World, adapter: Adapter) -> tuple[list[bool], list[bool]]:
    """Return what of each layer's input requires a gradient, and what of the backward got there."""
    model = adapter.model
    required, reached = [], [False] * len(model.model.layers)
    hooks = []

    def reach(at: int) -> Any:
        def mark(grad: torch.Tensor) -> None:
            reached[at] = True

        return mark

    def look(at: int) -> Any:
        def note(module: Any, given: tuple[torch.Tensor, ...]) -> None:
            required.append(given[0].requires_grad)
            if given[0].requires_grad:
                given[0].register_hook(reach(at))

        return note

    for at, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_pre_hook(look(at)))
    batch = collate(world.examples(n_rows=3), world.backbone.pad_token_id)
    adapter.zero_grad()
    nll_sum(model, batch).backward()  # type: ignore[no-untyped-call]
    assert adapter.grads.norm() > 0
    for hook in hooks:
        hook.remove()
    return required, reached


@pytest.mark.parametrize("lowest", [0, 1])
def test_the_backward_ends_at_the_lowest_adapter(lowest: int) -> None:
    """What enters the lowest adapted layer needs no gradient, nor does anything below."""
    world = make_world(layers_to_transform=[lowest])
    world.adapter.write(world.vector())
    required, reached = visited(world, world.adapter)
    assert required == [at > lowest for at in range(2)]
    assert reached == required


def nodes(loss: torch.Tensor) -> int:
    """Return how many operations the backward of a loss goes through."""
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
    return len(seen)


def test_a_frozen_layer_below_adds_nothing_to_the_backward() -> None:
    counts = []
    for layers in ([1], [0, 1]):
        world = make_world(layers_to_transform=layers)
        world.adapter.train_only(None)
        batch = collate(world.examples(n_rows=3), world.backbone.pad_token_id)
        counts.append(nodes(nll_sum(world.adapter.model, batch)))
        embedded = world.backbone.model.get_input_embeddings()(batch["input_ids"])
        assert not embedded.requires_grad
        world.adapter.close()
    upper, both = counts
    assert upper < 0.6 * both

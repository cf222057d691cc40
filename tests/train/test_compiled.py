"""Compiled layers: the same numbers but for rounding, and the plain ones again afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pfl_lm.model.adapter
from pfl_lm.data.batches import collate
from pfl_lm.errors import ModelError
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.compiled import CompiledLayers
from pfl_lm.model.states import TrunkStates
from pfl_lm.recipe import AdapterOptions
from pfl_lm.train.loss import nll_sum
from tests.world import World, make_world


@pytest.fixture
def world() -> World:
    made = make_world(layers_to_transform=[1])
    made.adapter.close()
    return made


def step(adapter: Adapter, world: World, rows: slice) -> tuple[Tensor, Tensor]:
    adapter.write(world.vector())
    adapter.zero_grad()
    batch = collate(world.examples()[rows], 0)
    loss = nll_sum(adapter.forward, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), adapter.grads.clone()


def adapted(world: World, **more: Any) -> Adapter:
    options = AdapterOptions.model_validate({"layers_to_transform": [1]})
    return Adapter(world.backbone, options, seed=11, **more)


@pytest.mark.slow
@pytest.mark.parametrize("trunk", [True, False])
def test_losses_and_gradients_are_those_of_the_plain_layers(world: World, trunk: bool) -> None:
    batches = [slice(0, 2), slice(2, 5), slice(0, 1)]
    remembered: Any = {"trunk": TrunkStates()} if trunk else {}
    plain = adapted(world, **remembered)
    wanted = [step(plain, world, rows) for rows in batches]
    plain.close()
    compiled = adapted(world, **remembered, compile=True)
    try:
        found = [step(compiled, world, rows) for rows in batches]
    finally:
        compiled.close()
    for (loss, grads), (other, others) in zip(found, wanted, strict=True):
        torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
        assert float((grads - others).norm() / others.norm()) < 1e-4
    again = adapted(world, **remembered)
    for rows, (loss, grads) in zip(batches, wanted, strict=True):
        now = step(again, world, rows)
        assert torch.equal(now[0], loss)
        assert torch.equal(now[1], grads)
    again.close()


def watched(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[nn.Module]:
    """Note which layers are compiled, without compiling them."""
    layers: list[nn.Module] = []

    def compile(layer: nn.Module, **options: Any) -> None:
        assert options == {"dynamic": True}
        layers.append(layer)

        def run(*given: Any, **named: Any) -> Any:
            if error is not None:
                raise error
            return layer._call_impl(*given, **named)

        layer._compiled_call_impl = run

    monkeypatch.setattr(nn.Module, "compile", compile)
    return layers


def test_what_the_trunk_remembers_is_not_compiled(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    adapter = adapted(world, trunk=TrunkStates(), compile=True)
    layers = adapter.model.model.layers
    assert seen == [layers[1]]
    adapter.close()
    assert layers[1]._compiled_call_impl is None
    seen.clear()
    without = adapted(world, compile=True)
    assert seen == list(layers)
    without.close()
    assert not adapted(world).model.model.layers[0]._compiled_call_impl


def test_a_machine_that_cannot_compile_says_so_and_leaves_the_model_as_it_was(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched(monkeypatch, RuntimeError("no C++ compiler\nand much more"))
    with pytest.raises(ModelError) as caught:
        adapted(world, compile=True)
    assert str(caught.value) == (
        "runtime.compile: this machine cannot compile the backbone (no C++ compiler)\n"
        "  hint: set runtime.compile: false"
    )
    model = world.backbone.model
    assert not any(layer._compiled_call_impl for layer in model.model.layers)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_model_whose_layers_are_not_known_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pfl_lm.model.adapter, "layers_of", lambda model: ("", None))
    with pytest.raises(ModelError, match="the backbone's layers are not in one list"):
        adapted(world, compile=True)
    with pytest.raises(ModelError):
        CompiledLayers(world.backbone.model, None)

"""Gradient checkpointing: layers run twice in training, once in scoring, to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pfl_lm.model.adapter
import pfl_lm.model.checkpointed
from pfl_lm.data.batches import collate
from pfl_lm.errors import ModelError
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.checkpointed import CheckpointedLayers
from pfl_lm.model.states import TrunkStates
from pfl_lm.recipe import AdapterOptions
from pfl_lm.train import LocalTrainer
from pfl_lm.train.loss import nll_sum
from tests.world import World, make_world, options


@pytest.fixture
def world() -> World:
    made = make_world(layers_to_transform=[1])
    made.adapter.close()
    return made


def adapted(world: World, layers: list[int] | None, **more: Any) -> Adapter:
    given = {"layers_to_transform": layers, "lora_dropout": 0.3}
    made = Adapter(world.backbone, AdapterOptions.model_validate(given), seed=11, **more)
    generator = torch.Generator().manual_seed(1)
    made.write(made.weights + 0.05 * torch.randn(len(made.weights), generator=generator))
    return made


def step(adapter: Adapter, world: World) -> tuple[Tensor, Tensor]:
    adapter.model.train()
    adapter.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss = nll_sum(adapter.forward, collate(world.examples()[:4], 0))
    loss.backward()  # type: ignore[no-untyped-call]
    adapter.model.eval()
    return loss.detach(), adapter.grads.clone()


def kept(adapter: Adapter, world: World) -> int:
    """Return the bytes that a forward keeps for its backward, beside parameters."""
    own = {each.untyped_storage().data_ptr() for each in adapter.model.parameters()}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    adapter.model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = nll_sum(adapter.forward, collate(world.examples()[:4], 0))
    adapter.model.eval()
    del loss
    return sum(held.values())


class Counted:
    """How often each layer's attention has run."""

    def __init__(self, adapter: Adapter) -> None:
        self.times = [0, 0]
        for at, layer in enumerate(adapter.model.model.layers):
            layer.self_attn.register_forward_pre_hook(lambda *given, at=at: self.count(at))

    def count(self, at: int) -> None:
        self.times[at] += 1


@pytest.mark.parametrize("trunk", [True, False])
@pytest.mark.parametrize("layers", [None, [1]])
def test_gradients_are_the_same_to_the_bit(
    world: World, layers: list[int] | None, trunk: bool
) -> None:
    remembered = {"trunk": TrunkStates()} if trunk else {}
    plain = adapted(world, layers, **remembered)
    wanted, much = step(plain, world), kept(plain, world)
    plain.close()
    adapter = adapted(world, layers, **remembered, gradient_checkpointing=True)
    assert float(wanted[1].norm()) > 0
    found = step(adapter, world)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert kept(adapter, world) < 0.7 * much
    adapter.close()
    again = adapted(world, layers, **remembered)
    assert torch.equal(step(again, world)[1], wanted[1])
    assert kept(again, world) == much
    again.close()


def test_layers_run_twice_in_training_and_once_in_scoring(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []
    real = pfl_lm.model.checkpointed.checkpoint

    def noted(*given: Any, **named: Any) -> Any:
        called.append(True)
        return real(*given, **named)

    monkeypatch.setattr(pfl_lm.model.checkpointed, "checkpoint", noted)
    adapter = adapted(world, None, gradient_checkpointing=True)
    counted = Counted(adapter)
    step(adapter, world)
    assert counted.times == [2, 2]
    assert len(called) == 2
    with torch.no_grad():
        nll_sum(adapter.forward, collate(world.examples()[:4], 0))
    assert counted.times == [3, 3]
    assert len(called) == 2


def test_a_remembered_layer_runs_once_for_each_row_and_never_again(world: World) -> None:
    adapter = adapted(world, [1], trunk=TrunkStates(), gradient_checkpointing=True)
    counted = Counted(adapter)
    step(adapter, world)
    assert counted.times == [4, 2]
    step(adapter, world)
    assert counted.times == [4, 4]


def test_a_fit_comes_to_the_same_numbers(world: World) -> None:
    ends = []
    for checkpointing in (False, True):
        adapter = adapted(world, None, gradient_checkpointing=checkpointing)
        trainer = LocalTrainer(
            adapter, world.examples(), options(max_steps=3), steps=3, pad_token_id=0, seed=5
        )
        ends.append(trainer.train(adapter.read(), steps=3))
        adapter.close()
    assert torch.equal(*ends)


def test_a_model_whose_layers_are_not_known_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pfl_lm.model.adapter, "layers_of", lambda model: ("", None))
    with pytest.raises(ModelError) as caught:
        adapted(world, None, gradient_checkpointing=True)
    assert str(caught.value) == (
        "training.gradient_checkpointing: the backbone's layers are not in one list, so it is not "
        "known what to run twice\n  hint: set training.gradient_checkpointing: false"
    )
    assert not any("lora" in name for name, _ in world.backbone.model.named_modules())
    with pytest.raises(ModelError):
        CheckpointedLayers(None)

"""The remembered trunk against the model that runs all of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pfl_lm.federation.noise
import pfl_lm.model.states
from pfl_lm.data.batches import collate
from pfl_lm.layout import AdapterLayout, Entry
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import Backbone
from pfl_lm.model.states import StatesFile, TrunkStates
from pfl_lm.model.trunk import Trunk, bytes_of_states, trunk_of
from pfl_lm.recipe import AdapterOptions
from pfl_lm.train.loss import nll_by_row, nll_sum
from tests.interruptions import go_on, stopped, whole
from tests.same import check_same, facts_in
from tests.world import World, make_world

TOP = {"layers_to_transform": [1]}
"""An adapter in the upper one of the tiny backbone's two layers."""


@pytest.fixture
def world() -> World:
    made = make_world(**TOP)
    made.adapter.close()
    return made


@pytest.fixture
def adapter(world: World) -> Iterator[Adapter]:
    made = with_trunk(world, TrunkStates())
    yield made
    made.close()


def with_trunk(world: World, states: TrunkStates) -> Adapter:
    """Return an adapter on the world's backbone, which has none, that remembers its trunk."""
    options = AdapterOptions.model_validate(TOP)
    made = Adapter(world.backbone, options, seed=11, trunk=states)
    made.write(world.vector())
    return made


def step(adapter: Adapter, forward: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    adapter.zero_grad()
    loss = nll_sum(forward, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), adapter.grads.clone()


def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_row_by_itself_has_the_same_loss_and_gradient_to_the_bit(
    world: World, adapter: Adapter
) -> None:
    assert isinstance(adapter.forward, Trunk)
    for example in world.examples():
        batch = collate([example], world.backbone.pad_token_id)
        wanted = step(adapter, adapter.model, batch)
        assert wanted[1].norm() > 0
        assert same(step(adapter, adapter.forward, batch), wanted)  # made
        assert same(step(adapter, adapter.forward, batch), wanted)  # remembered


def test_rows_that_share_a_batch_have_the_same_but_for_rounding(
    world: World, adapter: Adapter
) -> None:
    batch = collate(world.examples(n_rows=8), world.backbone.pad_token_id)
    assert (batch["attention_mask"] == 0).any()
    loss, grads = step(adapter, adapter.forward, batch)
    wanted_loss, wanted_grads = step(adapter, adapter.model, batch)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        found, wanted = (nll_by_row(f, batch) for f in (adapter.forward, adapter.model))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_lowest_layer_runs_once_for_each_row(world: World, adapter: Adapter) -> None:
    runs = [0]

    def count(*given: Any) -> None:
        runs[0] += 1

    world.backbone.model.model.layers[0].self_attn.register_forward_hook(count)
    examples = world.examples(n_rows=6)
    for chosen in (examples[:4], examples[2:], examples):
        step(adapter, adapter.forward, collate(chosen, world.backbone.pad_token_id))
    assert runs == [len({example.input_ids for example in examples})]


def test_a_step_with_remembered_rows_does_not_ask_which_rows_they_are(
    world: World, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(world.examples(n_rows=4), world.backbone.pad_token_id)
    wanted = step(adapter, adapter.forward, {k: batch[k] for k in batch if k != "rows"})
    with monkeypatch.context() as patch:
        for asking in ("tolist", "item", "__int__", "__float__"):  # transformers asks for a bool
            patch.setattr(Tensor, asking, lambda tensor: pytest.fail("it has waited"))
        adapter.zero_grad()
        loss = nll_sum(adapter.forward, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    assert same((loss.detach(), adapter.grads), wanted)


def test_states_do_not_depend_on_what_was_met_before(world: World) -> None:
    examples = world.examples(n_rows=4)
    batch = collate(examples, world.backbone.pad_token_id)
    found = []
    for met in ([], reversed(examples)):
        adapter = with_trunk(world, TrunkStates())
        for example in met:
            step(adapter, adapter.forward, collate([example], world.backbone.pad_token_id))
        found.append(step(adapter, adapter.forward, batch))
        adapter.close()
    assert same(*found)


def test_what_does_not_fit_is_made_again_with_the_same_bits(world: World) -> None:
    batch = collate(world.examples(n_rows=4), world.backbone.pad_token_id)
    found = []
    for states in (TrunkStates(), TrunkStates(most_bytes=1)):
        adapter = with_trunk(world, states)
        found.append(step(adapter, adapter.forward, batch))
        adapter.close()
    assert same(*found)
    assert states.n_bytes == 0


def test_another_depth_forgets_what_is_of_the_first() -> None:
    states = TrunkStates()
    made: list[tuple[int, ...]] = []

    def make(row: tuple[int, ...]) -> Tensor:
        made.append(row)
        return torch.zeros(2, 3)

    for depth in (1, 1, 2, 2, 1):
        states.of(depth, (7, 8), make)
    assert len(made) == 3
    assert states.n_bytes == 24


def test_closing_it_leaves_the_backbone_as_it_was(world: World) -> None:
    with_trunk(world, TrunkStates()).close()
    assert untouched(world.backbone.model)


def untouched(model: Any) -> bool:
    return all("forward" not in vars(layer) for layer in model.model.layers)


def layers(model: Any) -> list[str]:
    return [f"model.layers.{i}.self_attn.q_proj" for i in range(len(model.model.layers))]


def adapted(modules: list[str]) -> tuple[Entry, ...]:
    return AdapterLayout.of((module, "A", (1, 1)) for module in modules).entries


@pytest.mark.parametrize(
    "at",
    [
        *([0], [0, 1], ["lm_head"], [1, "lm_head"], ["model.embed_tokens"], []),
        *(["model.layers_too.1.q_proj"], ["layers.1.q_proj"]),
    ],
)
def test_where_there_is_no_trunk(world: World, at: list[Any]) -> None:
    model = world.backbone.model
    names = [layers(model)[each] if isinstance(each, int) else each for each in at]
    assert trunk_of(model, adapted(names), TrunkStates()) is None
    assert untouched(model)


def test_a_model_that_drops_out_while_it_trains_has_none(world: World) -> None:
    model = world.backbone.model
    model.config.attention_dropout = 0.1
    assert trunk_of(model, adapted(layers(model)[1:]), TrunkStates()) is None


def test_a_trunk_with_a_dropout_that_no_setting_names_is_none(world: World) -> None:
    model = world.backbone.model
    model.model.layers[0].mlp.hidden = nn.Dropout(0.1)
    assert trunk_of(model, adapted(layers(model)[1:]), TrunkStates()) is None


def test_a_list_of_layers_within_a_numbered_module_is_none(world: World) -> None:
    """Its first layer would be taken for the second, as the number before it says."""
    model = world.backbone.model
    model.stages = nn.ModuleList([nn.Module() for _ in range(3)])
    model.stages[1].layers = model.model.layers
    model.model.layers = nn.Sequential(*model.model.layers)
    names = ["stages.1.layers.0.self_attn.q_proj"]
    assert trunk_of(model, adapted(names), TrunkStates()) is None


def test_a_layer_that_mixes_rows_has_none(world: World) -> None:
    """What it makes of a row depends on the rows beside it, so it is no constant of the row."""
    model = world.backbone.model
    mix = model.model.layers[0].mlp.register_forward_hook(
        lambda module, given, out: out + out.mean(dim=0, keepdim=True)
    )
    assert trunk_of(model, adapted(layers(model)[1:]), TrunkStates()) is None
    assert untouched(model)
    mix.remove()
    assert trunk_of(model, adapted(layers(model)[1:]), TrunkStates()) is not None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_another_architecture(dropout: float) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}
    none = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
    config = GPT2Config(**shape, **none, resid_pdrop=dropout)
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(config).requires_grad_(False).eval()
    top = {"target_modules": ["c_attn"], "layers_to_transform": [2]}
    adapter = Adapter(
        Backbone(model, None, "tiny", None),
        AdapterOptions.model_validate(top),
        seed=0,
        trunk=TrunkStates(),
    )
    assert isinstance(adapter.forward, Trunk) == (dropout == 0.0)
    ids = torch.arange(20).reshape(2, 10)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    wanted = nll_sum(model, batch)
    torch.testing.assert_close(nll_sum(adapter.forward, batch), wanted, rtol=1e-5, atol=0)


ON = {"adapter.layers_to_transform": [1], "federation.rounds": 2}


def test_a_run_is_the_same_with_and_without_but_for_rounding(tmp_path: Path) -> None:
    with_it = whole(tmp_path / "a", **ON)
    without = whole(tmp_path / "b", **ON, **{"runtime.trunk_cache": "off"})
    found, wanted = (facts_in(folder)["scores"] for folder in (with_it, without))
    assert len(found) == len(wanted)
    for row, other in zip(found, wanted, strict=True):
        assert row[:4] == other[:4]
        assert row[4:] == pytest.approx(other[4:], rel=1e-5)


def test_a_run_is_the_same_to_the_bit_where_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a file, without one, and where all fits into memory."""
    wanted = whole(tmp_path / "a", **ON)
    monkeypatch.setattr(pfl_lm.model.states, "MOST_BYTES", 4000)
    read = spied(monkeypatch, "read")
    check_same(whole(tmp_path / "b", **ON), wanted)
    assert sum(found is not None for found in read) > 20
    read.clear()
    in_memory = {"runtime.trunk_cache": "memory"}
    other = whole(tmp_path / "c", **ON, **in_memory)
    assert facts_in(other)["scores"] == facts_in(wanted)["scores"]
    assert not read
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(
        path.name for path in (tmp_path / "a").iterdir()
    )


def spied(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Return what a method of `StatesFile` will have returned."""
    plain, seen = getattr(StatesFile, name), []

    def spy(self: StatesFile, *given: Any) -> Any:
        seen.append(plain(self, *given))
        return seen[-1]

    monkeypatch.setattr(StatesFile, name, spy)
    return seen


@pytest.mark.parametrize("k", [9, 21])
def test_a_run_that_goes_on_has_the_same_states_again(tmp_path: Path, k: int) -> None:
    wanted = whole(tmp_path / "whole", **ON)
    folder = stopped(tmp_path / "stopped", k, **ON)
    go_on(folder)
    check_same(folder, wanted)


def test_a_plan_knows_what_will_be_remembered(world: World) -> None:
    states = TrunkStates()
    adapter = with_trunk(world, states)
    examples = world.examples(n_rows=5)
    step(adapter, adapter.forward, collate(examples, world.backbone.pad_token_id))
    tokens = sum(len(example.input_ids) for example in examples)
    model = adapter.model
    assert bytes_of_states(model, adapter.layout.entries, tokens) == states.n_bytes > 0
    assert bytes_of_states(model, adapted(layers(model)), tokens) == 0
    adapter.close()


def test_a_private_step_is_the_same_with_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pfl_lm.federation.noise.secrets, "randbits", lambda bits: 7)
    lever = {"noise_multiplier": 0.5, "max_grad_norm": 1.0, "delta": 1e-2}
    private = {**ON, "privacy.record_level": lever}
    with_it = whole(tmp_path / "a", **private)
    without = whole(tmp_path / "b", **private, **{"runtime.trunk_cache": "off"})
    for row, other in zip(*(facts_in(f)["scores"] for f in (with_it, without)), strict=True):
        assert row[:4] == other[:4]
        assert row[4:] == pytest.approx(other[4:], rel=1e-4)

"""Every row's own gradient, against one backward pass for each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pfl_lm.data.batches import collate
from pfl_lm.errors import ModelError
from pfl_lm.layout import Vector
from pfl_lm.privacy.examples import take_rows, watched_rows
from pfl_lm.train.loss import mean_nll_by_row
from tests.parity.plain import PlainClient
from tests.privacy.by_hand import gradient_of
from tests.tiny import tiny_model
from tests.world import World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def by_row(world: World, at: Vector, n_rows: int = 5) -> Tensor:
    """Return ``(n_rows, d)``: the gradients of rows of unequal lengths, in one padded batch."""
    rows = world.examples()[:n_rows]
    assert len({len(row.input_ids) for row in rows}) > 2
    batch = collate(rows, world.backbone.pad_token_id)
    world.adapter.write(at)
    world.adapter.model.train()
    world.adapter.zero_grad()
    found = torch.zeros(n_rows, world.adapter.layout.d)
    with watched_rows(world.adapter):
        torch.autograd.backward(mean_nll_by_row(world.adapter.model, batch).sum())
        for entry, g in take_rows(world.adapter, n_rows):
            found[:, entry.start : entry.stop] = g.flatten(1)
        assert take_rows(world.adapter, n_rows) == []  # once only
    world.adapter.model.eval()
    return found


def test_they_are_those_of_each_row_alone(world: World) -> None:
    world.adapter.train_only(None)
    at = world.vector()
    found = by_row(world, at)
    alone = PlainClient(tiny_model(), at)
    for row, gradient in zip(world.examples(), found, strict=False):
        wanted = gradient_of(alone, row)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)
    assert (found != 0).float().mean() > 0.9
    assert float((found[0] - found[1]).abs().max()) > 1e-4


def test_their_sum_is_the_ordinary_gradient(world: World) -> None:
    world.adapter.train_only(None)
    found = by_row(world, world.vector())
    torch.testing.assert_close(found.sum(dim=0), world.adapter.grads, rtol=1e-5, atol=1e-7)


def test_a_bfloat16_backbone_has_float32_gradients_by_row() -> None:
    world = make_world("bfloat16")
    found = by_row(world, world.vector())
    torch.testing.assert_close(found.sum(dim=0), world.adapter.grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_only_what_is_trained_is_watched(world: World, factor: Any) -> None:
    world.adapter.train_only(factor)
    found = by_row(world, world.vector())
    trained = world.adapter.layout.mask(factor)
    assert torch.equal(found[:, ~trained], torch.zeros_like(found[:, ~trained]))
    assert (found[:, trained] != 0).float().mean() > 0.9
    world.adapter.train_only(None)


def test_nothing_is_left_behind_not_even_by_a_pass_that_failed(world: World) -> None:
    def traces() -> set[str]:
        modules = [each for _, each in world.adapter.model.named_modules()]
        hooks = {
            f"{type(each).__name__}.{name}"
            for each in modules
            for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            if getattr(each, name)
        }
        attributes = {
            name for each in (*modules, *world.adapter.parameters()) for name in vars(each)
        }
        return hooks | attributes

    world.adapter.train_only(None)
    batch = collate(world.examples()[:2], world.backbone.pad_token_id)
    before = traces()
    world.adapter.model.train()
    seen = []

    def stop() -> None:
        mean_nll_by_row(world.adapter.model, batch)  # and nothing goes backward from it
        seen.append(traces())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), watched_rows(world.adapter):
        stop()
    assert seen[0] != before
    world.adapter.model.eval()
    assert traces() == before
    by_row(world, world.vector())
    assert traces() == before


@pytest.mark.parametrize("as_many_as_rows", [False, True])
def test_a_module_that_sees_all_tokens_in_one_heap_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, as_many_as_rows: bool
) -> None:
    """As experts do, which may happen to get as many tokens as there are rows."""
    proj = world.adapter.model.model.layers[1].self_attn.q_proj
    straight = proj.forward

    def in_a_heap(x: Tensor) -> Tensor:
        if as_many_as_rows:
            return straight(x[:, 0])[:, None].expand(*x.shape[:2], -1)
        return straight(x.flatten(0, 1)).view(*x.shape[:2], -1)

    monkeypatch.setattr(proj, "forward", in_a_heap)
    with pytest.raises(ModelError) as caught:
        by_row(world, world.vector())
    assert caught.value.message == (
        "privacy.record_level: model.layers.1.self_attn.q_proj in this backbone sees the tokens of "
        "all rows mixed, so that a row's own gradient cannot be told"
    )
    assert caught.value.hint == (
        "adapt other modules (adapter.target_modules), such as those of the attention"
    )
    monkeypatch.undo()
    world.adapter.model.eval()


def test_a_module_that_sees_another_number_of_rows_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    proj = world.adapter.model.model.layers[0].self_attn.v_proj
    straight = proj.forward
    monkeypatch.setattr(
        proj, "forward", lambda x: straight(x.flatten(0, 1)[None]).view(*x.shape[:2], -1)
    )
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.v_proj in this backbone sees"):
        by_row(world, world.vector())

"""Losses from a head that is gone through in parts, against those from all its logits at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pfl_lm.model.head
from pfl_lm.data.batches import collate
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import Backbone
from pfl_lm.model.head import logits_at, top_of
from pfl_lm.plan.rehearsal import Rehearsal, Shape, rehearse
from pfl_lm.privacy.dpsgd import RecordLevel
from pfl_lm.recipe import AdapterOptions, RecordLevelOptions
from pfl_lm.train.loss import error_by_row, mean_nll_by_row, nll_by_row, nll_sum
from tests.tiny import tiny_model
from tests.world import World, make_world

LOSSES: list[Callable[..., Tensor]] = [nll_sum, nll_by_row, mean_nll_by_row, error_by_row]
PER_PART = 7
"""Positions in a part; those of the batches here are no multiple of it."""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def world(request: pytest.FixtureRequest) -> World:
    made = make_world(request.param)
    made.adapter.write(made.vector())
    return made


@pytest.fixture(scope="module")
def exact() -> World:
    made = make_world()
    made.adapter.write(made.vector())
    return made


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Yield what makes a model's head take so many positions at a time."""

    def cut(model: Any, n: int = PER_PART) -> None:
        vocabulary = model.get_output_embeddings().out_features
        monkeypatch.setattr(pfl_lm.model.head, "MOST_LOGITS", n * vocabulary + 1)

    yield cut
    pfl_lm.model.head._BENT.clear()


def batch_of(world: World, n_rows: int = 6) -> dict[str, Tensor]:
    batch = collate(world.examples(n_rows=n_rows), world.backbone.pad_token_id)
    assert len(batch["positions"]) > 3 * PER_PART
    assert len(batch["positions"]) % PER_PART
    return batch


def sizes(model: Any) -> list[int]:
    """Return a list to which each call of the head will add its positions."""
    seen: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    return seen


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_those_of_one_part(world: World, loss: Any, in_parts: Any) -> None:
    model, batch = world.adapter.model, batch_of(world)
    with torch.no_grad():
        wanted = loss(model, batch)
        in_parts(model)
        seen = sizes(model)
        found = loss(model, batch)
    n = len(batch["positions"])
    assert seen == [1, *[PER_PART] * (n // PER_PART), n % PER_PART]
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)


def gradient(world: World, loss: Tensor) -> Tensor:
    world.adapter.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return world.adapter.grads.clone()


@pytest.mark.parametrize("loss", LOSSES[:3])
def test_gradients_are_those_of_one_part(world: World, loss: Any, in_parts: Any) -> None:
    """In bfloat16 a gradient is rounded before it is scaled and not after: 2⁻⁸ each time."""
    model, batch = world.adapter.model, batch_of(world)

    def scaled() -> Tensor:
        nll: Tensor = loss(model, batch)
        weights = torch.linspace(0.01, 0.3, max(1, nll.numel()))
        return (nll * weights).sum()

    wanted = gradient(world, scaled())
    assert wanted.norm() > 0
    in_parts(model)
    found = gradient(world, scaled())
    close = 1e-6 if world.backbone.dtype == torch.float32 else 2**-7
    assert (found - wanted).norm() <= close * wanted.norm()


def test_one_part_is_what_it_was_to_the_bit(world: World, in_parts: Any) -> None:
    model, batch = world.adapter.model, batch_of(world)
    positions, labels = batch["positions"], batch["labels"].flatten()
    in_parts(model, len(positions))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert top_of(model, inputs, positions) is None
    by_hand = F.cross_entropy(
        logits_at(model, inputs, positions).float(), labels[positions + 1], reduction="sum"
    )
    found = nll_sum(model, batch)
    assert torch.equal(found, by_hand)
    assert torch.equal(gradient(world, found), gradient(world, by_hand))


def test_a_part_has_one_position_at_least(exact: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = exact.adapter.model, batch_of(exact)
    with torch.no_grad():
        wanted = nll_sum(model, batch)
        monkeypatch.setattr(pfl_lm.model.head, "MOST_LOGITS", 1)
        torch.testing.assert_close(nll_sum(model, batch), wanted, rtol=1e-6, atol=0)


def test_scoring_goes_no_way_back(exact: World, in_parts: Any) -> None:
    model, batch = exact.adapter.model, batch_of(exact)
    in_parts(model)
    with torch.no_grad():
        assert nll_by_row(model, batch).grad_fn is None
    assert nll_by_row(model, batch).grad_fn is not None


def rehearsed(shape: Shape, cut: Callable[[Any], None]) -> Rehearsal:
    """Rehearse the tiny backbone with a vocabulary that outweighs its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_model(), vocab_size=5000)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        options = AdapterOptions.model_validate({})
        adapter = Adapter(Backbone(model, None, "tiny", None), options, seed=0)
    cut(model)
    return rehearse(adapter.model, shape, shape, torch.device("cpu"))


def test_memory_is_that_of_a_part(in_parts: Any) -> None:
    """By rehearsal. Two copies of the logits where scores are made, three where gradients are."""
    n = 4 * 99
    shape = Shape(4, 100, 99)
    whole = rehearsed(shape, lambda model: None)
    parts = rehearsed(shape, lambda model: in_parts(model, n // 8 + 1))
    one = 4 * n * 5000
    for before, after, copies in (
        (whole.train, parts.train, 3),
        (whole.score, parts.score, 2),
    ):
        saved = before.small + before.large - after.small - after.large
        assert 0.8 * copies < saved / one < copies


@pytest.mark.parametrize("rows", [1, 5])
def test_a_private_gradient_is_that_of_one_part(exact: World, in_parts: Any, rows: int) -> None:
    options = RecordLevelOptions(noise_multiplier=1e-9, max_grad_norm=0.7, delta=1e-3)
    found = []
    for cut in (False, True):
        if cut:
            in_parts(exact.adapter.model)
        exact.adapter.zero_grad()
        private = RecordLevel(options, seed=3).gradient(exact.adapter, 0, 6.0)
        with private.watching():
            batch = collate(exact.examples(n_rows=rows), exact.backbone.pad_token_id)
            private.add(mean_nll_by_row(exact.adapter.model, batch))
        private.release()
        found.append(exact.adapter.grads.clone())
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


class Bent(nn.Module):
    """A model whose logits are not, or not plainly, what its head makes of its states."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 5).requires_grad_(how == "trained")
        self.runs = 0

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        self.runs += 1
        states = self.body(input_ids)
        logits = self.head(input=states) if self.how == "by keyword" else self.head(states)
        match self.how:
            case "scaled":
                logits = logits * 3.0
            case "scaled in place":
                logits = logits.mul_(3.0)
            case "head once more":
                self.head(states.flip(-1))
        return type("Out", (), {"logits": logits})


HOW = {"scaled": 3, "scaled in place": 3, "by keyword": 3, "head once more": 3}
PLAIN = {"plain": 2, "trained": 2}
"""How often the model has run after two losses: bent ones are found out once."""


@pytest.mark.parametrize("how", [*HOW, *PLAIN])
def test_a_model_that_does_more_to_its_logits(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Bent(how)
    ids = torch.tensor([[0, 1, 2, 3], [5, 4, 3, 2]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 5}

    def both() -> list[Tensor]:
        found = [nll_sum(model, batch), mean_nll_by_row(model, batch).sum()]
        grads = torch.autograd.grad(found[0] + 0.3 * found[1], list(model.parameters())[:1])
        trained = [p for p in model.head.parameters() if p.requires_grad]
        heads = torch.autograd.grad(nll_sum(model, batch), trained) if trained else ()
        return [*found, *grads, *heads]

    wanted = both()
    monkeypatch.setattr(pfl_lm.model.head, "MOST_LOGITS", 10)
    model.runs = 0
    for found, due in zip(both(), wanted, strict=True):
        torch.testing.assert_close(found, due)
    assert model.runs == (HOW | PLAIN)[how] + (how == "trained")
    assert not model.head._forward_pre_hooks
    assert not model.head._forward_hooks


@pytest.mark.parametrize("cap", [None, 0.5])
def test_an_architecture_that_caps_its_logits(cap: float | None, in_parts: Any) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=cap,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model: Any = Gemma2ForCausalLM(config).requires_grad_(False).eval()
    model.lm_head.weight.mul_(20)
    ids = torch.arange(24).reshape(2, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    wanted = nll_by_row(model, batch)
    in_parts(model)
    positions = torch.arange(23)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert (top_of(model, inputs, positions) is None) == (cap is not None)
    torch.testing.assert_close(nll_by_row(model, batch), wanted, rtol=1e-5, atol=0)

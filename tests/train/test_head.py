"""Losses from the positions that have one, against those from all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfl_lm.data.batches import collate
from pfl_lm.model.head import logits_at
from pfl_lm.train.loss import error_by_row, mean_nll_by_row, nll_by_row, nll_sum
from tests.world import World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    made = make_world()
    made.adapter.write(made.vector())
    return made


@pytest.fixture
def batch(world: World) -> dict[str, Tensor]:
    return collate(world.examples(n_rows=6), world.backbone.pad_token_id)


def all_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    return logits


def by_hand(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the nll of each row, ``(batch,)``, from the logits of every position."""
    rows = []
    for logits, labels in zip(all_logits(model, batch), batch["labels"], strict=True):
        spoken = [t for t in range(1, len(labels)) if labels[t] != -100]
        rows.append(sum(-F.log_softmax(logits[t - 1], 0)[labels[t]] for t in spoken))
    return torch.stack(rows)  # type: ignore[arg-type]


def test_losses_are_those_of_all_logits(world: World, batch: dict[str, Tensor]) -> None:
    model = world.adapter.model
    with torch.no_grad():
        wanted = by_hand(model, batch)
        torch.testing.assert_close(nll_by_row(model, batch), wanted)
        torch.testing.assert_close(nll_sum(model, batch), wanted.sum())
        n = (batch["labels"] != -100).sum(dim=1)
        torch.testing.assert_close(mean_nll_by_row(model, batch), wanted / n)


def test_gradients_are_those_of_all_logits(world: World, batch: dict[str, Tensor]) -> None:
    adapter = world.adapter
    found = []
    for loss in (nll_sum(adapter.model, batch), by_hand(adapter.model, batch).sum()):
        adapter.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        found.append(adapter.grads.clone())
    assert found[1].norm() > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_errors_are_those_of_all_logits(world: World, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        guesses = all_logits(world.adapter.model, batch).argmax(dim=-1)[:, :-1]
        wanted = batch["labels"][:, 1:]
        spoken = wanted != -100
        shares = ((guesses != wanted) & spoken).sum(1) / spoken.sum(1)
        torch.testing.assert_close(error_by_row(world.adapter.model, batch), shares)


def test_the_head_sees_nothing_else(world: World, batch: dict[str, Tensor]) -> None:
    head = world.adapter.model.get_output_embeddings()
    seen: list[tuple[int, ...]] = []
    hook = head.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)))
    with torch.no_grad():
        nll_sum(world.adapter.model, batch)
    hook.remove()
    n = int((batch["labels"] != -100).sum())
    assert n < batch["labels"].numel() / 2
    assert seen == [(1, n, head.out_features)]


def test_positions_may_be_left_to_be_found(world: World, batch: dict[str, Tensor]) -> None:
    bare = {name: tensor for name, tensor in batch.items() if name != "positions"}
    with torch.no_grad():
        assert torch.equal(
            nll_by_row(world.adapter.model, bare), nll_by_row(world.adapter.model, batch)
        )


def test_a_batch_without_a_supervised_token_has_no_loss(world: World) -> None:
    ids = torch.ones(2, 4, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids * -100}
    with torch.no_grad():
        assert float(nll_sum(world.adapter.model, batch)) == 0.0
        assert nll_by_row(world.adapter.model, batch).tolist() == [0.0, 0.0]


class Other(nn.Module):
    """A model that calls its head by a keyword, or has another one, and bends its logits."""

    def __init__(self, head: nn.Module, *, keyword: bool = False) -> None:
        super().__init__()
        self.head, self.keyword = head, keyword

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Any:
        states = torch.stack([input_ids.float(), input_ids.float() ** 2], dim=-1)
        logits = self.head(input=states) if self.keyword else self.head(states)
        return type("Out", (), {"logits": 3.0 * torch.tanh(logits / 3.0)})


@pytest.mark.parametrize(
    "model",
    [
        Other(nn.Linear(2, 5)),
        Other(nn.Linear(2, 5), keyword=True),
        Other(nn.Sequential(nn.Linear(2, 5))),
    ],
    ids=["plain", "by keyword", "another head"],
)
def test_what_a_model_does_with_its_logits_stays(model: Other) -> None:
    ids = torch.arange(6).reshape(2, 3)
    with torch.no_grad():
        wanted = model(ids).logits.flatten(0, 1)[[1, 5]]
        torch.testing.assert_close(
            logits_at(model, {"input_ids": ids}, torch.tensor([1, 5])), wanted
        )
    assert not model.head._forward_pre_hooks

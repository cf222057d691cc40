"""The rehearsal against sums on paper, and against what a real backward keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import Backbone
from pfl_lm.plan.memory import Memory
from pfl_lm.plan.rehearsal import LARGE, Blocks, Rehearsal, Shape, rehearse
from pfl_lm.recipe import AdapterOptions
from tests.tiny import tiny_model
from tests.world import make_world

CPU = torch.device("cpu")
ROWS, TOKENS, SUPERVISED, VOCABULARY = 3, 5, 2, 1000
LOGITS = ROWS * SUPERVISED * VOCABULARY
"""Numbers in the logits that predict something; there are no others."""


class Plain(nn.Module):
    """A trainable head on states of one number each."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = nn.Linear(1, VOCABULARY, bias=False, dtype=dtype)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        states = input_ids.to(self.head.weight.dtype).unsqueeze(-1)
        return SimpleNamespace(logits=self.head(states))


def in_bytes(dtype: torch.dtype) -> Rehearsal:
    with torch.device("meta"):
        model = Plain(dtype)
    shape = Shape(ROWS, TOKENS, SUPERVISED)
    return rehearse(model, shape, shape, CPU)


def close(found: int, expected: int) -> bool:
    """Allow for what is as small as the labels: scalars, int64 of each token."""
    return expected <= found <= expected + 16 * 8 * ROWS * TOKENS + 8 * VOCABULARY


def test_scoring_holds_two_copies_in_float32_by_hand() -> None:
    """bfloat16: the logits and their copy in float32; then without them the log-probabilities."""
    half = in_bytes(torch.bfloat16).score
    assert close(half.small, max(2 * LOGITS + 4 * LOGITS, 4 * LOGITS + 4 * LOGITS))
    full = in_bytes(torch.float32).score  # of which no copy is made
    assert close(full.small, 4 * LOGITS + 4 * LOGITS)
    assert half.large == full.large == 0


def test_training_adds_the_gradient_of_the_log_probabilities_by_hand() -> None:
    """Log-probabilities, their gradient and that of the logits, all in float32."""
    trained = in_bytes(torch.bfloat16).train
    assert close(trained.small, 3 * 4 * LOGITS)


def test_blocks_from_32_mib_on_are_large() -> None:
    with torch.device("meta"):
        model = Plain(torch.bfloat16)
    tokens = LARGE // (4 * VOCABULARY) + 2  # a copy in float32 is large, one in bfloat16 is not
    n = (tokens - 1) * VOCABULARY
    score = rehearse(model, Shape(1, 2, 1), Shape(1, tokens, tokens - 1), CPU).score
    assert score.large == 2 * 4 * n
    assert 2 * n < score.small < 4 * n


def outlined(**adapter: Any) -> Adapter:
    """Return the tiny backbone with an adapter, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_model())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.requires_grad_(False)
        options = AdapterOptions.model_validate(adapter)
        return Adapter(Backbone(model, None, "tiny", None), options, seed=0)


def test_weights_are_not_counted() -> None:
    """Not even those that a view of them comes out of an operation."""
    adapter = outlined()
    n = sum(parameter.numel() for parameter in adapter.model.parameters())
    blocks = rehearse(adapter.model, Shape(1, 2, 1), Shape(1, 2, 1), CPU)
    assert 4 * n > 300_000
    assert max(blocks.train.small, blocks.score.small) < 100_000


def test_layers_below_the_lowest_adapted_one_keep_nothing() -> None:
    shape = Shape(2, 30, 10)
    kept = {
        layers: rehearse(outlined(layers_to_transform=list(layers)).model, shape, shape, CPU).train
        for layers in ((0,), (1,), (0, 1))
    }
    assert kept[1,].small < kept[0,].small < kept[0, 1].small


def test_a_real_step_keeps_what_the_rehearsed_one_does() -> None:
    """All that a real forward saves for its backward is part of the peak that was rehearsed."""
    shape = Shape(4, 60, 59)
    rehearsed = rehearse(outlined().model, shape, shape, CPU).train
    model = make_world().adapter.model
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    from pfl_lm.train.loss import nll_sum

    batch = {
        name: torch.ones(shape.rows, shape.tokens, dtype=torch.int64)
        for name in ("input_ids", "attention_mask", "labels")
    }
    batch["attention_mask"][0, -1] = 0  # as padding does, which makes a mask of its own
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nll_sum(model, batch)
    assert 0.8 * sum(saved.values()) < rehearsed.small < 1.6 * sum(saved.values())


def memory(*, on_host: bool = True, file: int = 0) -> Memory:
    blocks = Rehearsal(train=Blocks(small=400, large=30), score=Blocks(small=100, large=50))
    return Memory(
        process=10_000,
        weights=2_000,
        file=file,
        vectors=300,
        trunk=7_000,
        blocks=blocks,
        on_host=on_host,
    )


def test_the_peak_by_hand() -> None:
    assert memory().host == 10_000 + 2_000 + 300 + 7_000 + 500 + 50
    assert memory(file=9_000).host == 10_000 + 2_000 + 9_000
    assert memory(on_host=False, file=4_000).host == 10_000 + 2_000 + 4_000
    assert memory(on_host=False).on_device == 2_000 + 300 + 7_000 + 500 + 50


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_tied_weights_count_once_and_dropout_runs(dropout: float) -> None:
    adapter = outlined(lora_dropout=dropout)
    tied = adapter.model.get_output_embeddings().weight
    rehearse(adapter.model, Shape(1, 4, 2), Shape(1, 4, 2), CPU)
    model = adapter.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is not tied

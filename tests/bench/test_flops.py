"""The count of operations by formula, against PyTorch's own count of what it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pfl_lm.bench.case import Case
from pfl_lm.bench.flops import Matrices, Shape
from pfl_lm.bench.machine import Multiplication
from pfl_lm.train.loss import nll_sum
from tests.bench.cases import TOP, tiny_case
from tests.tiny import save_model

QUERIES_AND_VALUES = ["q_proj", "v_proj"]
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

MODULES = {
    "q v": QUERIES_AND_VALUES,
    "q k v": ["q_proj", "k_proj", "v_proj"],
    "everything": EVERYTHING,
}


def counted(case: Case, *, trunk: bool, everywhere: bool) -> tuple[int, int]:
    """Return the operations of the first batch: as PyTorch counts them, and by the formula."""
    [batch, *_] = case.batches()
    with case.adapter(trunk=case.trunk if trunk else None) as adapter:
        adapter.model.train()
        nll_sum(adapter.forward, batch)  # what is to be remembered now is
        adapter.zero_grad()
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter:  # others are not counted on a CPU
            if everywhere:
                inputs = {n: batch[n] for n in ("input_ids", "attention_mask", "labels")}
                adapter.model(**inputs, use_cache=False).loss.backward()
            else:
                nll_sum(adapter.forward, batch).backward()
        adapted = [entry.module for entry in adapter.layout.entries]
        matrices = Matrices.of(adapter.model, adapted)
    return counter.get_total_flops(), matrices.step(
        Shape.of(batch, everywhere=everywhere), trunk=trunk
    )


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("four") / "model", n_layers=4))


@pytest.mark.parametrize("everywhere", [False, True], ids=["supervised", "everywhere"])
@pytest.mark.parametrize("layers", [None, [1], [3], [1, 3]], ids=str)
@pytest.mark.parametrize("modules", MODULES.values(), ids=MODULES)
def test_the_formula_is_what_pytorch_counts(
    tmp_path: Path,
    four_layers: str,
    layers: list[int] | None,
    modules: list[str],
    everywhere: bool,
) -> None:
    changes: dict[str, Any] = {
        "backbone.model_name_or_path": four_layers,
        "adapter.layers_to_transform": layers,
        "adapter.target_modules": modules,
    }
    case = tiny_case(tmp_path, **changes)
    for trunk in [False, True] if layers and not everywhere else [False]:
        real, formula = counted(case, trunk=trunk, everywhere=everywhere)
        too_much = 1.06 if modules == QUERIES_AND_VALUES else 1  # the keys' gradients
        assert real <= formula <= too_much * real


def test_a_trunk_saves_the_layers_below(tmp_path: Path) -> None:
    case = tiny_case(tmp_path, **TOP)
    shape = Shape(rows=2, tokens=10, logits=4)
    with case.adapter() as adapter:
        matrices = Matrices.of(adapter.model, [e.module for e in adapter.layout.entries])
    layer = 64 * (64 + 32 + 32 + 64 + 3 * 128)
    lora_a, lora_b = 2 * 8 * 64, 8 * (64 + 32)
    qkv = 64 * (64 + 32 + 32)
    assert matrices.forward == {0: layer, 1: layer + lora_a + lora_b}
    assert matrices.backward == {0: 0, 1: layer - qkv + lora_a + 2 * lora_b}
    assert matrices.lowest == 1
    assert matrices.head == 64 * adapter.model.config.vocab_size
    assert matrices.width == 64
    saved = matrices.step(shape) - matrices.step(shape, trunk=True)
    assert saved == 20 * (2 * layer + 4 * 10 * 64)


def test_a_multiplication_is_measured() -> None:
    product = Multiplication(torch.float32, torch.device("cpu"))
    wall, cpu, n = product.measured()
    assert n % (2 * product.side**3) == 0
    assert 1e8 < n / wall < 1e14
    assert cpu > 0

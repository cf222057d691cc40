"""Runs that share a loaded backbone are, to the byte, those that load their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pfl_lm.federation.watch import Watch
from pfl_lm.finetune import Common, finetune, load_common
from pfl_lm.methods import METHODS
from pfl_lm.model.adapter import Adapter
from pfl_lm.preflight import preflight
from pfl_lm.recipe import load_recipe
from tests.same import check_same
from tests.tiny import tiny_recipe

DROPOUT = {"adapter.lora_dropout": 0.2}


def common_of(recipe: Path) -> Common:
    loaded = load_recipe(recipe)
    return load_common(loaded.recipe, preflight(loaded), torch.device("cpu"), Watch())


def test_one_run_after_another_is_as_each_alone(tmp_path: Path) -> None:
    """Another method, another seed and a run that fails in between leave no trace."""
    recipe = tiny_recipe(tmp_path, **DROPOUT)
    common = common_of(recipe)
    runs: list[list[Any]] = [[f"method.name={name}", f"seed={i}"] for i, name in enumerate(METHODS)]
    runs.insert(1, ["method.name=fedavg", "training.learning_rate=1e30"])
    for i, changes in enumerate(runs):
        alone, shared = (
            load_recipe(recipe, [*changes, f"name=run-{i}", f"runtime.output_dir={tmp_path / how}"])
            for how in ("alone", "shared")
        )
        if "training.learning_rate=1e30" in changes:
            with pytest.raises(Exception, match="diverged"):
                finetune(shared, common=common)
            continue
        check_same(finetune(shared, common=common).folder, finetune(alone).folder)


def test_an_adapter_that_is_taken_out_leaves_the_backbone_as_it_was(tmp_path: Path) -> None:
    loaded = load_recipe(tiny_recipe(tmp_path))
    backbone = common_of(loaded.path).backbone
    names = [name for name, _ in backbone.model.named_parameters()]
    first = Adapter(backbone, loaded.recipe.adapter, seed=1)
    weights = first.read()
    first.close()
    assert [name for name, _ in backbone.model.named_parameters()] == names
    assert not hasattr(backbone.model, "peft_config")
    again = Adapter(backbone, loaded.recipe.adapter, seed=1)
    assert torch.equal(again.read(), weights)


def test_the_untouched_backbone_is_scored_once_for_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores in the second run are those of the first, to the bit; the cost is not."""
    import pfl_lm.federation.client as client

    calls = [0]

    def counted(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        return client_score(*given, **named)

    client_score = client.score
    monkeypatch.setattr(client, "score", counted)
    recipe = tiny_recipe(tmp_path)
    common = common_of(recipe)
    counts = []
    for name in ("first", "second"):
        calls[0] = 0
        finetune(load_recipe(recipe, [f"name={name}", f"seed={len(name)}"]), common=common)
        counts.append(calls[0])
    # 3 clients: round 0, round 1, then 4 candidates on validation and test, the base known
    assert counts == [3 * (1 + 1 + 3 + 4), 3 * (1 + 3 + 3)]

"""What only GPUs can show: their own reduction, and float16 as they compute it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pfl_lm.finetune import finetune
from pfl_lm.recipe import load_recipe
from tests.federation.test_ranks import TORCHRUN, end_of, launch, recipe
from tests.runs import ask, scored

pytestmark = pytest.mark.gpu

CHANGES = {"federation.rounds": 3, "training.per_device_train_batch_size": 3}


def folder(place: Path, name: str) -> Path:
    return place / name / "runs" / "tiny"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("parallel", ["clients", "data"])
def test_two_gpus_come_to_what_one_does(tmp_path: Path, parallel: str) -> None:
    two = str(recipe(tmp_path, "two", **CHANGES))
    command = ("-m", "pfl_lm", "finetune", two, f"runtime.parallel={parallel}")
    code, _, err = end_of(launch(*TORCHRUN, *command, ACCELERATE_USE_CPU="false"))
    assert code == 0, err
    finetune(load_recipe(recipe(tmp_path, "one", **CHANGES)))
    for one, other in zip(
        scored(folder(tmp_path, "one")), scored(folder(tmp_path, "two")), strict=True
    ):
        assert {**one, "value": ""} == {**other, "value": ""}
        assert float(one["value"]) == pytest.approx(float(other["value"]), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_float16_trains(tmp_path: Path, optimizer: str) -> None:
    how = {"backbone.dtype": "float16", "method.name": "fedavg", "training.optimizer": optimizer}
    how["training.learning_rate"] = 0.1 if optimizer == "sgd" else 0.002
    finetune(load_recipe(recipe(tmp_path, "half", **CHANGES, **how)))
    turns = ask(folder(tmp_path, "half"), "SELECT summary FROM turns ORDER BY round, client")
    told = [json.loads(text) for (text,) in turns]
    assert all(0 <= each["skipped_steps"] <= 2 for each in told)
    assert all(each["loss_scale"] >= 1 for each in told)
    losses = [each["loss_last"] for each in told]
    assert sum(losses[-3:]) < sum(losses[:3])

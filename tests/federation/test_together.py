"""Two ranks that take each client's turn together: what one process makes of it, to rounding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pfl_lm.finetune import finetune
from pfl_lm.recipe import load_recipe
from pfl_lm.train import PersonalizedLM
from tests.federation.rank_runs import overflow, same_secret
from tests.federation.test_ranks import RUNS, Ended, by_hand, end_of, recipe
from tests.runs import ask, scored

CLOSE = 1e-5
HALF = 5e-3
"""How close float16 is to itself where rows are padded otherwise."""

ADAMW = {"training.optimizer": "adamw", "training.learning_rate": 0.002}
UNEVEN: dict[str, Any] = {
    "federation.rounds": 3,
    "training.max_steps": 3,
    "training.per_device_train_batch_size": 3,
    "runtime.parallel": "data",
}
RECIPES: dict[str, dict[str, Any]] = {
    "pflalign": {},
    "pflalign, accumulated": {"training.gradient_accumulation_steps": 3},
    "pflalign on AdamW's direction": {
        **ADAMW,
        "method.precondition_target": "update",
        "method.update_scale": "match",
    },
    "a row at a time": {
        "training.per_device_train_batch_size": 1,
        "method.name": "fedavg",
        "method.weighting": "tokens",
    },
    "local": {"method.name": "local", **ADAMW},
    "ditto": {
        "method.name": "ditto",
        **ADAMW,
        "training.local_epochs": 1,
        "training.max_steps": None,
    },
    "scaffold": {"method.name": "scaffold", "data.group_by_length": True},
    "a rate to be found": {"training.learning_rate": "auto"},
    "diagnosed, remembered rows": {
        "runtime.diagnostics": True,
        "adapter.layers_to_transform": [1],
    },
    "private": {
        "method.name": "fedavg",
        "privacy.record_level": {"noise_multiplier": 0.1, "max_grad_norm": 1.0, "delta": 1e-3},
    },
    "half": {"backbone.dtype": "float16"},
}
OVERFLOWING: dict[str, dict[str, Any]] = {
    "overflow, pflalign": {"backbone.dtype": "float16"},
    "overflow, local": {"backbone.dtype": "float16", "method.name": "local", **ADAMW},
    "overflow, scaffold": {"backbone.dtype": "float16", "method.name": "scaffold"},
    "overflow, float32": {},
}


def written(place: Path, name: str, **changes: Any) -> Path:
    return recipe(place, name, **{**UNEVEN, **changes})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


def run_alone(place: Path, name: str, **changes: Any) -> None:
    finetune(load_recipe(written(place, f"one-{name}", **changes, **{"runtime.parallel": "auto"})))


@pytest.fixture(scope="module")
def ranks(place: Path) -> list[Ended]:
    """Run every recipe on two ranks, and meanwhile the same here."""
    two = [str(written(place, f"two-{name}", **how)) for name, how in RECIPES.items()]
    over = [str(written(place, f"two-{name}", **how)) for name, how in OVERFLOWING.items()]
    started = by_hand(*RUNS, *two, "--overflowing", "1", *over)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pfl_lm.federation.noise.secrets.randbits", same_secret)
        for name, how in RECIPES.items():
            run_alone(place, name, **how)
        backward = PersonalizedLM.on_after_backward
        patch.setattr(PersonalizedLM, "on_after_backward", backward)  # to be put back
        overflow("all")
        for name, how in OVERFLOWING.items():
            run_alone(place, name, **how)
    return [end_of(process) for process in started]


def folder(place: Path, name: str) -> Path:
    return place / name / "runs" / "tiny"


def tensors(place: Path, name: str) -> dict[str, torch.Tensor]:
    found = folder(place, name).rglob("*.safetensors")
    return {
        f"{path.relative_to(folder(place, name))}: {key}": tensor
        for path in sorted(found)
        for key, tensor in load_file(path).items()
    }


def summaries(place: Path, name: str) -> list[tuple[Any, ...]]:
    rows = ask(folder(place, name), "SELECT round, client, summary FROM turns ORDER BY 1, 2")
    return [(round, client, json.loads(text)) for round, client, text in rows]


@pytest.mark.parametrize("name", [*RECIPES, *OVERFLOWING])
def test_two_ranks_come_to_what_one_process_does(
    ranks: list[Ended], place: Path, name: str
) -> None:
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    alone, shared = (tensors(place, f"{n}-{name}") for n in ("one", "two"))
    assert len(alone) > 10
    assert shared.keys() == alone.keys()
    is_half = (RECIPES | OVERFLOWING)[name].get("backbone.dtype") == "float16"
    close = HALF if is_half else CLOSE
    tight = {"rtol": close, "atol": close}
    for key, tensor in alone.items():
        torch.testing.assert_close(shared[key], tensor, **tight, msg=lambda m, k=key: f"{k}: {m}")
    start = torch.cat([t.flatten() for k, t in alone.items() if k.startswith("adapters")])
    assert start.abs().max() > 0
    for one, two in zip(
        scored(folder(place, f"one-{name}")), scored(folder(place, f"two-{name}")), strict=True
    ):
        assert {**one, "value": ""} == {**two, "value": ""}
        assert math.isclose(float(one["value"]), float(two["value"]), rel_tol=close)
    for one, two in zip(
        summaries(place, f"one-{name}"), summaries(place, f"two-{name}"), strict=True
    ):
        assert one[:2] == two[:2]
        assert one[2].keys() == two[2].keys()
        for key, number in one[2].items():
            assert math.isclose(number, two[2][key], rel_tol=100 * close, abs_tol=close), key


def test_rank_0_alone_speaks_and_says_what_is_shared(ranks: list[Ended]) -> None:
    (_, out, _), (_, other_out, _) = ranks
    said = "2 ranks share each client's turn (runtime.parallel: data): as the recipe says"
    assert out.count(said) == len(RECIPES) + len(OVERFLOWING)
    assert other_out == ""


@pytest.mark.parametrize("name", OVERFLOWING)
@pytest.mark.parametrize("n", ["one", "two"])
def test_all_ranks_leave_out_a_step_that_overflows_on_one(
    ranks: list[Ended], place: Path, n: str, name: str
) -> None:
    """Every turn's second gradient does; the scale goes on from turn to turn of each client."""
    told = summaries(place, f"{n}-{name}")
    assert len(told) == 9
    for round, _, summary in told:
        assert summary["skipped_steps"] == 1
        if "float32" not in name:
            assert summary["loss_scale"] == 2.0 ** (16 - round)
    if "local" in name:
        for path in (folder(place, f"{n}-{name}") / "clients").rglob("*.safetensors"):
            with safe_open(path, "pt") as file:
                numbers = json.loads(file.metadata()["scalars"])
            assert numbers["adamw_step"] == 3 * 2  # two steps of three, three turns


def test_a_run_notes_what_was_shared(ranks: list[Ended], place: Path) -> None:
    query = "SELECT value FROM run WHERE key = 'parallel'"
    noted = [ask(folder(place, f"{n}-pflalign"), query) for n in ("one", "two")]
    assert noted == [[("clients",)], [("data on 2 ranks",)]]


# --- a rank that fails ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failing(place: Path) -> list[Ended]:
    """Runs in which rank 1 alone cannot go on; the last of them ends both."""
    names = ("lean", "faulty", "apart", "never")
    lean, faulty, apart, never = (str(written(place, name)) for name in names)
    spoiled = ("--lean", "carol@1", lean, "--faulty", "alice@1", faulty, "--apart", "bob@1", apart)
    return [end_of(process) for process in by_hand(*RUNS, *spoiled, never)]


def faults(place: Path, name: str) -> list[tuple[Any, ...]]:
    return ask(folder(place, name), "SELECT round, client, kind, message FROM faults ORDER BY 1, 2")


def test_a_rank_out_of_memory_has_all_try_smaller_batches(
    failing: list[Ended], place: Path
) -> None:
    found = faults(place, "lean")
    assert [each[1:3] for each in found] == [("carol", "memory")] * 3
    turns = ask(folder(place, "lean"), "SELECT client FROM turns WHERE round = 1")
    assert ("carol",) in turns


def test_a_turn_that_fails_on_one_rank_is_left_out_on_all(
    failing: list[Ended], place: Path
) -> None:
    found = faults(place, "faulty")
    of_alice = [each for each in found if each[1] == "alice"]
    assert of_alice[0][2:] == ("raised", "client 'alice' on rank 1 hint: lower it")
    assert len(of_alice) == 6
    turns = ask(folder(place, "faulty"), "SELECT DISTINCT client FROM turns ORDER BY client")
    assert turns == [("bob",), ("carol",)]


def test_ranks_that_hold_different_numbers_end(failing: list[Ended], place: Path) -> None:
    (code, out, said), (other_code, _, other_said) = failing
    assert (code, other_code) == (2, 2)
    assert said == (
        "client 'bob': after a turn that ranks took together they hold different numbers, as "
        "unlike processors may compute them\n"
        "  hint: run on machines that are alike, or write runtime.parallel: clients"
    )
    assert other_said == ""
    assert not folder(place, "never").exists()
    shared = "2 ranks share each client's turn (runtime.parallel: data): as the recipe says"
    assert out.count(shared) == 3
    assert not ask(folder(place, "apart"), "SELECT * FROM turns WHERE client = 'bob'")

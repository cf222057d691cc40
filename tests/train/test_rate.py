"""`learning_rate: auto`: the formula, what it is invariant to, and starting again with half."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from pfl_lm.errors import DivergedError
from pfl_lm.federation import rate as federation_rate
from pfl_lm.federation.watch import Watch
from pfl_lm.finetune import finetune
from pfl_lm.recipe import load_recipe
from pfl_lm.train import rate as train_rate
from pfl_lm.train.rate import TAU, median_rate, suggested_rate
from tests.tiny import tiny_recipe
from tests.world import World, make_world


class Notes(Watch):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def run(tmp_path: Path, **changes: Any) -> tuple[Path, list[str]]:
    recipe = load_recipe(tiny_recipe(tmp_path, **{"training.learning_rate": "auto"}, **changes))
    notes = Notes()
    return finetune(recipe, notes).folder, notes.said


def facts(folder: Path) -> dict[str, str]:
    with sqlite3.connect(folder / "federation.sqlite") as ledger:
        return dict(ledger.execute("SELECT key, value FROM run"))


def test_the_rate_by_hand_for_one_step(world: World) -> None:
    """At T = 1 the moments are fresh: P = (1-β)², so η = τ L₀ / ((1-β)² |g|²)."""
    at = world.vector()
    trainer = world.trainer(steps=1)
    (window,) = trainer.windows(1)
    loss, grad = trainer.loss_and_grad(at, window[0])
    by_hand = TAU * loss / (0.01 * float(grad.double().square().sum()))
    assert suggested_rate(trainer, at, beta=0.9, eps=0.0) == pytest.approx(by_hand, rel=1e-5)


def test_it_takes_no_step(world: World) -> None:
    at = world.vector()
    suggested_rate(world.trainer(), at, beta=0.9, eps=0.0)
    assert torch.equal(world.adapter.read(), at)


def test_accumulated_windows_suggest_what_one_big_batch_does(world: World) -> None:
    at = world.vector()
    rows = world.examples(n_rows=4)
    whole = world.trainer(steps=1, rows=rows, per_device_train_batch_size=4)
    parts = world.trainer(
        steps=1, rows=rows, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    rates = [suggested_rate(each, at, beta=0.9, eps=0.0) for each in (whole, parts)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-4)


def test_scaling_the_loss_scales_the_rate_by_its_inverse(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, at = world.trainer(), world.vector()
    plain = suggested_rate(trainer, at, beta=0.9, eps=0.0)
    measured = trainer.loss_and_grad

    def scaled(at: torch.Tensor, batch: Any) -> tuple[float, torch.Tensor]:
        loss, grad = measured(at, batch)
        return 1024 * loss, 1024 * grad

    monkeypatch.setattr(trainer, "loss_and_grad", scaled)
    assert suggested_rate(trainer, at, beta=0.9, eps=0.0) == pytest.approx(plain / 1024, rel=1e-5)


def test_the_median_of_what_is_finite() -> None:
    assert median_rate([1.0, float("nan"), 7.0, 3.0]) == 3.0
    assert median_rate([12.3456]) == 12
    assert median_rate([float("nan")]) is None


def test_the_choice_is_said_stored_and_the_same_again(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    folder, said = run(tmp_path)
    again, _ = run(tmp_path / "again")
    chosen = facts(folder)["learning_rate"]
    assert any(text == f"learning_rate: auto chose {float(chosen):g}" for text in said)
    assert facts(again)["learning_rate"] == chosen
    assert (folder / "metrics.csv").read_bytes() == (again / "metrics.csv").read_bytes()


def test_auto_ends_where_its_number_written_out_ends(tmp_path: Path) -> None:
    folder, _ = run(tmp_path)
    (tmp_path / "written").mkdir()
    number = float(facts(folder)["learning_rate"])
    written = load_recipe(tiny_recipe(tmp_path / "written", **{"training.learning_rate": number}))
    finetune(written)
    ends = [f / "adapters" / "alice" / "adapter_model.safetensors" for f in (folder,)]
    other = written.run_folder / "adapters" / "alice" / "adapter_model.safetensors"
    assert ends[0].read_bytes() == other.read_bytes()


def test_too_high_a_rate_is_halved_until_every_client_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_rate, "TAU", 400.0)
    folder, said = run(tmp_path)
    tried = [text for text in said if text.startswith("learning_rate: auto chose")]
    assert len(tried) > 1
    assert sum("starting again with half" in text for text in said) == len(tried) - 1
    with sqlite3.connect(folder / "federation.sqlite") as ledger:
        summaries = [json.loads(text) for (text,) in ledger.execute("SELECT summary FROM turns")]
        assert len(summaries) == 3 * 2  # nothing is left of the attempts that failed
    first = [summary for summary in summaries if "batches_before" in summary]
    assert len(first) == 3
    assert all(summary["batches_after"] <= summary["batches_before"] for summary in first)
    assert not (folder / "uploads").exists()


def test_it_gives_up_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_rate, "TAU", 1e12)
    monkeypatch.setattr("pfl_lm.finetune.MOST_HALVINGS", 2)
    with pytest.raises(DivergedError, match="auto found no rate, down to"):
        run(tmp_path)
    assert federation_rate.MOST_HALVINGS == 10

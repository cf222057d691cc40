"""``runtime.tracking``: what TensorBoard finds in a run's ``logs/``."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import pfl_lm.recipe.checks
from pfl_lm.errors import PflError
from pfl_lm.federation.messages import Update
from pfl_lm.federation.watch import RoundReport, Watch, Watches, Workload
from pfl_lm.finetune import finetune
from pfl_lm.preflight import check_recipe
from pfl_lm.recipe import load_recipe
from pfl_lm.report.tracking import TensorBoard
from tests.tiny import tiny_recipe

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason='TensorBoard is not installed: pip install "pfl-lm[tracking]"',
)
CLIENTS = ("alice", "bob", "carol")
WORKLOAD = Workload(rounds=1, clients=1, steps=1, rows=1)


class Heard(Watch):
    def __init__(self) -> None:
        self.rounds: list[RoundReport] = []

    def round(self, report: RoundReport) -> None:
        self.rounds.append(report)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return every number in the event files below a folder: value by step, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def report(round: int, mean: float = 2.0) -> RoundReport:
    return RoundReport(round, 1, "global", 1.5, mean, 2.5, "é", 8, 0.25)


@needs_tensorboard
def test_a_run_writes_every_round_and_every_turn(tmp_path: Path) -> None:
    heard = Heard()
    recipe = tiny_recipe(tmp_path, **{"runtime.tracking": "tensorboard"})
    folder = finetune(load_recipe(recipe), heard).folder

    found = scalars(folder / "logs")
    wanted: dict[str, dict[int, float]] = {
        "validation/mean": {r.round: r.mean for r in heard.rounds},
        "validation/worst": {r.round: r.worst for r in heard.rounds},
        "train/loss": {r.round: r.train_loss for r in heard.rounds if r.train_loss is not None},
        "round/bytes_up": {r.round: r.bytes_up for r in heard.rounds},
        "round/seconds": {r.round: r.seconds for r in heard.rounds},
    }
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        turns = ledger.execute("SELECT round, client, summary, seconds FROM turns").fetchall()
    for round, client, text, seconds in turns:
        for name, value in {**json.loads(text), "seconds": seconds}.items():
            wanted.setdefault(f"{name}/{client}", {})[round] = value
    assert found.keys() == wanted.keys()
    for tag, values in wanted.items():
        assert found[tag] == pytest.approx(values, rel=1e-6), tag
    assert set(found["validation/mean"]) == {0, 1, 2}
    for client in CLIENTS:
        for name in ("loss_first", "loss_last", "preconditioner_mean", "gamma_mean"):
            assert set(found[f"{name}/{client}"]) == {1, 2}
        assert {f"correction_mean/{client}", f"offset_norm/{client}"} <= found.keys()


@needs_tensorboard
def test_a_run_that_begins_again_keeps_nothing_of_the_first_attempt(tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path / "logs", {"é": "e"})
    for mean in (1.0, 2.0):
        tracker.begin(WORKLOAD)
        tracker.round(report(0, mean))
    assert scalars(tmp_path / "logs")["validation/mean"] == {0: 2.0}  # and before it is closed
    tracker.round(report(1, 3.0))
    tracker.turn(Update("run", 1, "é", summary={"loss_last": 4.0}, seconds=0.5))
    tracker.close()
    found = scalars(tmp_path / "logs")
    assert found["validation/mean"] == {0: 2.0, 1: 3.0}
    assert found["loss_last/e"] == {1: 4.0}
    assert found["seconds/e"] == {1: 0.5}


def test_without_tracking_nothing_is_written(tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path, **{"federation.rounds": 1}))
    assert recipe.recipe.runtime.tracking == "none"
    assert not (finetune(recipe).folder / "logs").exists()


def test_a_missing_package_is_found_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pfl_lm.recipe.checks, "find_spec", lambda name: None)
    recipe = tiny_recipe(tmp_path, **{"runtime.tracking": "tensorboard"})
    with pytest.raises(PflError) as caught:
        check_recipe(recipe)
    assert caught.value.message == "runtime.tracking: tensorboard is not installed here"
    assert caught.value.hint == 'pip install "pfl-lm[tracking]"'
    assert check_recipe(recipe, ["runtime.tracking=none"]).clients.keys() == set(CLIENTS)
    with pytest.raises(PflError, match="not installed") as both:
        check_recipe(recipe, ["data.path=nowhere.jsonl", "training.lr=1"])
    assert "nowhere.jsonl" in both.value.message
    assert "training.learning_rate" in both.value.message


def test_several_watches_hear_all_there_is_to_hear() -> None:
    told = [name for name in vars(Watch) if not name.startswith("_")]
    assert told == [name for name in vars(Watches) if not name.startswith("_")]
    calls: list[tuple[str, str, tuple[Any, ...]]] = []

    class Spy(Watch):
        def __init__(self, name: str) -> None:
            self.name = name

        def __getattribute__(self, attribute: str) -> Any:
            if attribute in told:
                name = object.__getattribute__(self, "name")
                return lambda *given: calls.append((name, attribute, given))
            return object.__getattribute__(self, attribute)

    both = Watches(Spy("a"), Spy("b"))
    heard: dict[str, tuple[Any, ...]] = {
        "note": ("text",),
        "begin": (WORKLOAD,),
        "step": (),
        "rows": (3,),
        "turn": (Update("run", 1, "é"),),
        "round": (report(1),),
    }
    for name in told:
        getattr(both, name)(*heard[name])
    assert calls == [(who, name, heard[name]) for name in told for who in ("a", "b")]

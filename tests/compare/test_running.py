"""The cells of a comparison: run, interrupted, gone on with, copied together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pfl_lm.compare.plan import Plan
from pfl_lm.compare.reading import read_cells
from pfl_lm.compare.running import run_cells
from pfl_lm.errors import PflError
from pfl_lm.evaluate.standings import standings
from pfl_lm.finetune import finetune
from pfl_lm.layout import Vector
from pfl_lm.methods import METHODS
from pfl_lm.model.adapter import Adapter
from pfl_lm.recipe import load_recipe
from pfl_lm.resume import run_recipe
from tests.compare.worlds import CELLS, Killed, Told, plan_in, run_in, timeless
from tests.same import check_same, files_in


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Told]:
    """A comparison that was run without an interruption. Read it only."""
    return run_in(tmp_path_factory.mktemp("whole"))


def test_every_rate_with_the_first_seed_then_the_chosen_ones(whole: tuple[Plan, Told]) -> None:
    plan, told = whole
    assert plan.folder.name == "tiny-compare"
    assert told.counts == [(9, 0)]
    assert tuple(told.began) == CELLS
    assert [trial.name for trial in told.ended] == list(CELLS)
    assert sorted(path.name for path in (plan.folder / "cells").iterdir()) == sorted(CELLS)
    found = read_cells(plan)
    assert (found.n_over, found.n_left, found.strangers) == (9, 0, ())
    assert told.notes.count("loading the backbone onto cpu") == 1


def test_a_cell_is_to_the_byte_the_run_it_would_be_alone(
    whole: tuple[Plan, Told], tmp_path: Path
) -> None:
    plan, _ = whole
    for name in ("fedavg-adamw-s7-r0.01", "local-s3-r0.3", "pflalign-s3-r0.3"):
        cell = plan.folder / "cells" / name
        loaded = load_recipe(cell / "recipe.resolved.yaml", [f"runtime.output_dir={tmp_path}"])
        check_same(finetune(loaded).folder, cell)


def test_cells_differ_in_method_seed_and_rate_alone(whole: tuple[Plan, Told]) -> None:
    plan, _ = whole
    trials = read_cells(plan).trials
    assert len({trial.digest for trial in trials}) == 1
    assert [(t.label, t.method, t.optimizer) for t in trials[2:3]] == [
        ("fedavg-adamw", "fedavg", "adamw")
    ]
    for trial in trials:
        recipe = run_recipe(plan.folder / "cells" / trial.name).recipe
        assert (recipe.seed, recipe.training.learning_rate) == (trial.seed, trial.rate)
        assert recipe.compare is None
        assert trial.about["device"] == "cpu"
        assert trial.outcome is not None
        assert trial.outcome.steps == 3 * 2 * 2  # clients, rounds, steps


def test_with_one_seed_all_methods_start_from_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: dict[str, Vector] = {}
    told = Told()

    def recorded(*given: Any, **named: Any) -> Adapter:
        made = Adapter(*given, **named)
        starts[told.began[-1]] = made.read()
        return made

    monkeypatch.setattr("pfl_lm.finetune.Adapter", recorded)
    run_cells(plan_in(tmp_path, methods=("fedavg",), rates="0.1"), told)
    assert torch.equal(starts["fedavg-s7-r0.1"], starts["local-s7-r0.1"])
    assert torch.equal(starts["fedavg-s3-r0.1"], starts["local-s3-r0.1"])
    assert not torch.equal(starts["fedavg-s3-r0.1"], starts["fedavg-s7-r0.1"])


def test_what_is_over_is_not_run_again(
    whole: tuple[Plan, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the backbone is loaded."""
    plan, _ = whole
    before = files_in(plan.folder)
    monkeypatch.setattr("pfl_lm.compare.running.load_common", None)
    told = Told()
    found = run_cells(plan, told)
    assert (told.began, found.n_over) == ([], 9)
    assert files_in(plan.folder).keys() == before.keys()


@pytest.mark.parametrize("steps", [0, 5, 40, 107])
def test_stopped_and_gone_on_with_it_ends_the_same(
    whole: tuple[Plan, Told], tmp_path: Path, steps: int
) -> None:
    """Nine cells of twelve steps: before the first, within it, in the middle and in the last."""
    expected, _ = whole
    plan = plan_in(tmp_path)
    with pytest.raises(Killed):
        run_cells(plan, Told(steps))
    n_over = steps // 12
    left = read_cells(plan)
    assert left.n_over == n_over
    assert n_over + left.n_left == 9
    told = Told()
    run_cells(plan, told)
    assert told.counts == [(9, n_over)]
    assert tuple(told.began) == CELLS[n_over:]
    for name in CELLS:
        check_same(plan.folder / "cells" / name, expected.folder / "cells" / name)


def test_halves_from_two_machines_are_the_whole(whole: tuple[Plan, Told], tmp_path: Path) -> None:
    """Each has run some of the methods; `local` comes with both."""
    expected, _ = whole
    one, _ = run_in(tmp_path / "one", methods=("pflalign",), output=tmp_path / "a")
    other, _ = run_in(tmp_path / "two", methods=("fedavg:adamw@0.001/0.01",))
    together = plan_in(tmp_path / "three", output=tmp_path / "both")
    assert read_cells(together).n_left == 9
    for half in (one, other):
        shutil.copytree(half.folder, together.folder, dirs_exist_ok=True)
    assert read_cells(together).n_left == 0
    assert timeless(together) == timeless(expected)
    mine = standings(timeless(together), together.seeds)
    theirs = standings(timeless(expected), expected.seeds)
    assert [row.against_best for row in mine.methods] == [
        row.against_best for row in theirs.methods
    ]
    assert mine.wins == theirs.wins


def test_cells_of_other_rates_and_labels_are_kept_and_named(
    whole: tuple[Plan, Told], tmp_path: Path
) -> None:
    """The first seed is another one now, whose grid is not complete."""
    expected, _ = whole
    folder = tmp_path / "copy"
    shutil.copytree(expected.folder, folder)
    plan = plan_in(tmp_path / "a", methods=("pflalign",), seeds="3,7", output=folder)
    found = read_cells(plan)
    assert found.missing == ("pflalign-s3-r0.1", "local-s3-r0.1")
    assert found.n_unnamed == 2
    assert [t.name for t in found.trials if t.state == "finished"] == [
        *("pflalign-s3-r0.3", "local-s3-r0.3", "pflalign-s7-r0.1"),
        *("pflalign-s7-r0.3", "local-s7-r0.1", "local-s7-r0.3"),
    ]
    assert found.strangers == (
        *("fedavg-adamw-s3-r0.01", "fedavg-adamw-s7-r0.001", "fedavg-adamw-s7-r0.01"),
    )


# --- cells that fail --------------------------------------------------------------------------


def test_a_cell_that_diverges_is_a_result(tmp_path: Path) -> None:
    plan, told = run_in(tmp_path, methods=("fedavg@0.1/1e30",), rates="0.1", seeds="7,3")
    states = {trial.name: trial.state for trial in told.ended}
    assert states == {
        "fedavg-s7-r0.1": "finished",
        "fedavg-s7-r1e30": "failed",
        "local-s7-r0.1": "finished",
        "fedavg-s3-r0.1": "finished",
        "local-s3-r0.1": "finished",
    }
    [gone] = [trial for trial in told.ended if trial.state == "failed"]
    assert gone.reason.startswith("round 1: 0 of 3 clients came through")
    assert "alice: its update is" in gone.reason
    again = Told()
    run_cells(plan, again)
    assert again.began == []
    [grid, _] = standings(read_cells(plan).trials, plan.seeds).grids
    assert [(t.rate, t.state) for t in grid.tried] == [(0.1, "finished"), (1e30, "failed")]
    assert grid.chosen == 0.1


def test_a_method_that_diverges_at_every_rate_has_no_further_cells(tmp_path: Path) -> None:
    plan, told = run_in(tmp_path, methods=("fedavg@1e30",), rates="0.1", seeds="7,3")
    assert told.counts == [(4, 0)]
    assert told.began == ["fedavg-s7-r1e30", "local-s7-r0.1", "local-s3-r0.1"]
    found = read_cells(plan)
    assert (found.n_over, found.n_left) == (3, 0)


def test_a_fault_that_is_no_divergence_ends_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(METHODS["fedavg"], "turn", broken)
    plan = plan_in(tmp_path, methods=("fedavg",), rates="0.1", seeds="7")
    with pytest.raises(PflError) as caught:
        run_cells(plan, Told())
    assert str(caught.value).startswith(
        "cell fedavg-s7-r0.1: round 1: 0 of 3 clients came through, federation.min_clients is 1"
    )
    assert read_cells(plan).trials[0].state == "begun"
    monkeypatch.undo()
    run_cells(plan, Told())
    assert read_cells(plan).n_left == 0


def test_a_target_module_that_is_not_there_is_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(PflError, match=r"adapter\.target_modules: 'nope' not in this backbone"):
        plan_in(tmp_path, **{"adapter.target_modules": ["nope"]})


def test_a_target_module_that_turns_out_not_to_be_there_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfl_lm.preflight.refuse_misfit", lambda folder, adapter: None)
    plan = plan_in(tmp_path, **{"adapter.target_modules": ["nope"]})
    with pytest.raises(PflError, match=r"cell pflalign-s7-r0\.1: adapter\.target_modules: 'nope'"):
        run_cells(plan, Told())
    assert read_cells(plan).trials[0].state == "missing"

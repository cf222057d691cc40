"""What is checked before a comparison runs, all of it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfl_lm.compare.cells import grid_cells
from pfl_lm.compare.plan import Asked, make_plan
from pfl_lm.errors import PflError
from tests.tiny import tiny_recipe


def refusal(recipe: Path, asked: Asked, *overrides: str) -> list[str]:
    with pytest.raises(PflError) as caught:
        make_plan(recipe, overrides, asked)
    return str(caught.value).splitlines()


def test_the_command_line_stands_before_the_recipe(tmp_path: Path) -> None:
    section = {"methods": ["local"], "seeds": [5], "rates": [0.5]}
    recipe = tiny_recipe(tmp_path, compare=section)
    plan = make_plan(recipe, [], Asked())
    assert [cell.name for cell in grid_cells(plan)] == ["local-s5-r0.5"]
    plan = make_plan(recipe, [], Asked(["fedavg, pflalign", "a=fedavg:adamw"], "1,2", "0.1,0.2"))
    assert [(c.label, c.rates) for c in plan.contenders] == [
        (label, (0.1, 0.2)) for label in ("fedavg", "pflalign", "a", "local")
    ]
    assert plan.seeds == (1, 2)
    plan = make_plan(recipe, ["compare.seeds=[8]"], Asked())
    assert plan.seeds == (8,)


def test_seeds_and_rates_are_the_recipes_where_none_are_given(tmp_path: Path) -> None:
    plan = make_plan(tiny_recipe(tmp_path, seed=11), [], Asked(["fedavg"]))
    assert [cell.name for cell in grid_cells(plan)] == ["fedavg-s11-r0.1", "local-s11-r0.1"]
    assert plan.folder == tmp_path / "runs" / "tiny-compare"


def test_a_folder_of_its_own_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    plan = make_plan(recipe, [], Asked(["fedavg"], output=Path("here")))
    assert plan.folder == tmp_path / "here"
    [cell, _] = grid_cells(plan)
    assert cell.loaded.run_folder == tmp_path / "here" / "cells" / "fedavg-s7-r0.1"
    assert not plan.folder.exists()


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    """The recipe, the methods, the data, the backbone and the place."""
    recipe = tiny_recipe(tmp_path, **{"federation.rounds": 0})
    (tmp_path / "file").write_text("")
    changes = ("data.path=nope.jsonl", f"backbone.model_name_or_path={tmp_path / 'nope'}")
    asked = Asked(["fedavgg", "fedavg:beta=1"], "x", output=tmp_path / "file")
    said = refusal(recipe, asked, *changes)
    starts = [
        f"{recipe}: 3 problems",
        f"  line {line_of(recipe, 'rounds')}  federation.rounds: must be a whole number from 1 ",
        "  --methods fedavgg,fedavg:beta=1: compare.methods[0]: there is no method 'fedavgg'. ",
        "  --seeds x: compare.seeds[0]: expected a whole number, got 'x'",
        f"{recipe}: 1 problem",
        "  --methods fedavgg,fedavg:beta=1: compare.methods[1] (fedavg): method.beta: ",
    ]
    wrong = [line for line, start in zip(said, starts, strict=False) if not line.startswith(start)]
    assert wrong == []
    rest = "\n".join(said[6:])
    assert "nope.jsonl" in rest
    assert f"{tmp_path / 'nope'}: there is no such folder" in rest
    assert f"{tmp_path / 'file'}: {tmp_path / 'file'} is a file, not a folder" in rest


def line_of(path: Path, key: str) -> int:
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if f"{key}:" in line)


def test_nothing_to_compare(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    told = [
        f"{recipe}: no methods to compare",
        "  hint: name them: --methods pflalign,fedavg,fedavg:sgd; or in the recipe's `compare`",
    ]
    assert refusal(recipe, Asked()) == told
    assert refusal(recipe, Asked([","])) == told


def test_a_runs_folder_is_none_for_a_comparison(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "federation.sqlite").write_text("")
    assert refusal(recipe, Asked(["fedavg"], output=folder)) == [
        f"{folder}: holds a run, not a comparison",
        "  hint: choose another folder with --output",
    ]


def test_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(tiny_recipe(tmp_path), Asked(["fedavg"])) == [
        "a comparison is run by one process, and this is one of 2",
        "  hint: start it without torchrun; to share the work, give other machines other methods "
        "and copy their folders together",
    ]


def test_the_command_can_be_typed_again() -> None:
    asked = Asked(["fedavg", "local"], "0,1", "1e-3", Path("out"))
    words = ["--methods", "fedavg,local", "--seeds", "0,1", "--rates", "1e-3", "--output", "out"]
    assert asked.words() == words
    assert Asked().words() == []

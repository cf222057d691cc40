"""A run that is stopped at any commit and gone on with ends as one that never was."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pfl_lm.errors import RecipeError
from pfl_lm.federation.ledger import Ledger
from pfl_lm.finetune import finetune
from pfl_lm.methods import METHODS
from pfl_lm.resume import run_recipe
from tests.interruptions import Killed, cli, go_on, killed_at, stopped, whole
from tests.same import check_same, facts_in, files_in
from tests.tiny import tiny_recipe

CHANGES: dict[str, Any] = {"federation.fraction_train": 0.7, "adapter.lora_dropout": 0.2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """One run without an interruption, and how many commits it makes. Read it only."""
    with killed_at(10**6) as seen:
        folder = whole(tmp_path_factory.mktemp("whole"), **CHANGES)
    return folder, seen[0]


@pytest.mark.parametrize("share", [i / 12 for i in range(13)])
def test_stopped_anywhere_it_ends_the_same(
    tmp_path: Path, uninterrupted: tuple[Path, int], share: float
) -> None:
    expected, n_commits = uninterrupted
    assert n_commits > 30
    folder = stopped(tmp_path, 1 + round(share * (n_commits - 1)), **CHANGES)
    check_same(go_on(folder), expected)


@pytest.mark.slow
def test_stopped_at_every_commit_it_ends_the_same(
    tmp_path: Path, uninterrupted: tuple[Path, int]
) -> None:
    expected, n_commits = uninterrupted
    for k in range(1, n_commits + 1):
        check_same(go_on(stopped(tmp_path / str(k), k, **CHANGES)), expected)


def test_stopped_again_and_again_it_ends_the_same(
    tmp_path: Path, uninterrupted: tuple[Path, int]
) -> None:
    """Each attempt gets a little further: a note of the recipe, an attempt, and three commits."""
    folder = stopped(tmp_path, 9, **CHANGES)
    for _ in range(100):
        try:
            with killed_at(6):
                go_on(folder)
        except Killed:
            continue
        break
    check_same(go_on(folder), uninterrupted[0])
    assert not [name for name in files_in(folder) if name.endswith(".part")]


WITH_MOMENTS = ("local", "pflalign", "ditto")
"""Methods whose state or form is another one with AdamW."""


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [*((name, "sgd") for name in METHODS), *((name, "adamw") for name in WITH_MOMENTS)],
)
def test_every_method_goes_on_as_it_was(tmp_path: Path, method: str, optimizer: str) -> None:
    changes: dict[str, Any] = {"method.name": method, "training.optimizer": optimizer}
    if (method, optimizer) == ("pflalign", "adamw"):
        changes |= {"method.precondition_target": "update", "method.update_scale": "match"}
    folder = stopped(tmp_path / "stopped", 20, **changes)
    check_same(go_on(folder), whole(tmp_path / "whole", **changes))


def test_an_automatic_rate_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too high a rate at first; stopped in the round that shows it, and after it was halved."""
    monkeypatch.setattr("pfl_lm.train.rate.TAU", 400.0)
    changes = {"training.learning_rate": "auto"}
    expected = whole(tmp_path / "whole", **changes)
    for k in (12, 20, 30):
        check_same(go_on(stopped(tmp_path / str(k), k, **changes)), expected)


def test_what_an_interruption_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 25)
    ours = [
        "clients/alice/state-9.safetensors",
        "server/state-9.safetensors",
        "uploads/9/bob.safetensors",
        "adapters/bob/.adapter_config.json.123.part",
        ".metrics.csv.123.part",
    ]
    theirs = ["clients/alice/notes.txt", "mine.txt", "server/state-x.safetensors"]
    for name in (*ours, *theirs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left")
    go_on(folder)
    assert [name for name in ours if (folder / name).exists()] == []
    for name in theirs:
        assert (folder / name).read_text() == "left"
        (folder / name).unlink()
    check_same(folder, whole(tmp_path / "b"))


# --- more rounds ------------------------------------------------------------------------------


def test_more_rounds_lead_where_as_many_at_once_would(tmp_path: Path) -> None:
    short = whole(tmp_path / "short", **CHANGES)
    long = whole(tmp_path / "long", **CHANGES, **{"federation.rounds": 4})
    extended = go_on(short, rounds=4)
    mine, theirs = files_in(extended), files_in(long)
    assert mine.keys() == theirs.keys()
    apart = ("metrics.csv", "recipe.yaml", "recipe.resolved.yaml", "federation.sqlite")
    assert [n for n in mine if mine[n] != theirs[n] and n not in apart] == []
    assert "rounds: 4" in (extended / "recipe.resolved.yaml").read_text()
    mine_said, theirs_said = facts_in(extended), facts_in(long)
    for table in ("scores", "metrics"):  # round 2 was final once
        assert set(theirs_said.pop(table)) < set(mine_said.pop(table))
    assert mine_said == theirs_said


def test_fewer_rounds_end_a_run_early(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 20, **CHANGES, **{"federation.rounds": 4})
    with closing(Ledger(folder / "federation.sqlite")) as ledger:
        assert ledger.last_begun() == 1
    check_same(go_on(folder, rounds=2), whole(tmp_path / "b", **CHANGES))


def test_a_round_that_has_begun_cannot_be_taken_back(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    with pytest.raises(RecipeError) as caught:
        run_recipe(folder, rounds=1)
    assert str(caught.value) == (
        "federation.rounds: 1, and round 2 of this run has begun already\n  hint: the least is 2"
    )


# --- the command line -------------------------------------------------------------------------


def test_resume_says_where_it_goes_on_and_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 30)
    code, out, err = cli("resume", str(folder))
    assert (code, err) == (0, "")
    assert out.startswith(f"tiny: pflalign, going on in {folder}\n")
    assert "3 clients, round 1 of 2 is over; left to do: " in out
    code, out, _ = cli("resume", str(folder))
    assert (code, out) == (
        0,
        f"{folder}: finished, all 2 rounds\n"
        f"next: for more of them  pfl-lm resume {folder} --rounds 4\n",
    )


def test_finetune_resume_goes_on_or_begins(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 20)
    recipe = str(tmp_path / "a" / "recipe.yaml")
    code, _, said = cli("finetune", recipe)
    assert code == 2
    assert said == (
        f"{folder}: this run folder already holds a run\n  hint: go on with it by "
        f"`pfl-lm resume {folder}`; or choose another `name` or `runtime.output_dir`, "
        "or remove it\n"
    )
    assert cli("finetune", recipe, "--resume")[0] == 0
    check_same(folder, whole(tmp_path / "b"))
    fresh = str(tiny_recipe(tmp_path, name="fresh"))
    assert cli("finetune", fresh, "--resume")[0] == 0


def test_a_run_folder_may_be_moved(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 25)
    moved = tmp_path / "elsewhere" / "another name"
    moved.parent.mkdir()
    folder.rename(moved)
    assert finetune(run_recipe(moved), resume=True).folder == moved
    check_same(moved, whole(tmp_path / "b"))
    assert not folder.exists()

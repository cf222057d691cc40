"""Cells that do not belong to a comparison, or cannot be read, are refused by name."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pfl_lm.compare.cells import plain_rate
from pfl_lm.compare.fit import digest
from pfl_lm.compare.plan import Plan
from pfl_lm.compare.reading import read_cells
from pfl_lm.compare.running import run_cells
from pfl_lm.errors import RunFolderError
from pfl_lm.recipe import load_recipe
from tests.compare.worlds import Told, plan_in, run_in
from tests.tiny import client_rows, save_model, tiny_recipe, write_jsonl

ONE: dict[str, Any] = {"methods": ("fedavg",), "seeds": "7", "rates": "0.1"}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of two cells. Read it only."""
    return run_in(tmp_path_factory.mktemp("cells"), **ONE)[0].folder


def misfits(plan: Plan) -> list[str]:
    """Return the lines of a refusal: the folder, then a line a cell, then the hint."""
    with pytest.raises(RunFolderError) as caught:
        read_cells(plan)
    first, *lines, hint = str(caught.value).splitlines()
    n = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert first == f"{plan.folder}: cells that do not fit this comparison: {n}"
    assert hint == (
        "  hint: remove their folders to have them run anew; or give --output another folder"
    )
    return [line.removeprefix("  ") for line in lines]


def test_another_budget_is_named_key_by_key_for_each_cell(cells: Path, tmp_path: Path) -> None:
    changed = ("training.max_steps=3", "federation.rounds=4", "adapter.r=4")
    told = (
        "adapter.r: 4, and it was run with 8; "
        "federation.rounds: 4, and it was run with 2; "
        "training.max_steps: 3, and it was run with 2"
    )
    plan = plan_in(tmp_path, output=cells, overrides=changed, **ONE)
    assert misfits(plan) == [f"fedavg-s7-r0.1: {told}", f"local-s7-r0.1: {told}"]


def test_a_label_that_stood_for_other_options_is_refused(cells: Path, tmp_path: Path) -> None:
    plan = plan_in(
        tmp_path, output=cells, **{**ONE, "methods": ("fedavg=fedavg:weighting=uniform",)}
    )
    assert misfits(plan) == [
        "fedavg-s7-r0.1: method.weighting: 'uniform', and it was run with 'examples'"
    ]


def test_a_cell_in_another_ones_folder_is_refused(cells: Path, tmp_path: Path) -> None:
    shutil.copytree(cells, tmp_path / "copy")
    place = tmp_path / "copy" / "cells"
    (place / "fedavg-s7-r0.1").rename(place / "fedavg-s8-r0.1")
    plan = plan_in(tmp_path / "a", output=tmp_path / "copy", **{**ONE, "seeds": "8"})
    assert misfits(plan) == [
        "fedavg-s8-r0.1: name: 'fedavg-s8-r0.1', and it was run with 'fedavg-s7-r0.1'; "
        "seed: 8, and it was run with 7"
    ]


def test_other_rows_and_other_clients_are_refused(cells: Path, tmp_path: Path) -> None:
    rows = client_rows(("alice", "bob", "dora"))
    rows[0]["completion"] = "another answer"
    path = write_jsonl(tmp_path / "other.jsonl", rows)
    plan = plan_in(tmp_path, output=cells, **ONE, **{"data.path": str(path)})
    told = "its clients are others: 'carol', 'dora'; other rows of 'alice'"
    assert misfits(plan) == [f"fedavg-s7-r0.1: {told}", f"local-s7-r0.1: {told}"]


def test_the_same_rows_elsewhere_and_a_backbone_that_was_moved_are_as_good(
    cells: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    (tmp_path / "b").mkdir()
    shutil.copytree(tiny_model_dir, tmp_path / "moved model")
    path = write_jsonl(tmp_path / "b" / "moved.jsonl", client_rows())
    moved = {"data.path": str(path), "backbone.model_name_or_path": str(tmp_path / "moved model")}
    plan = plan_in(tmp_path / "b", output=cells, **ONE, **moved)
    assert read_cells(plan).n_left == 0


def test_another_backbone_is_refused_before_anything_runs(cells: Path, tmp_path: Path) -> None:
    shutil.copytree(cells, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "cells" / "local-s7-r0.1")
    model = save_model(tmp_path / "model", seed=1)
    told = Told()
    plan = plan_in(
        tmp_path / "b",
        output=tmp_path / "copy",
        **ONE,
        **{"backbone.model_name_or_path": str(model)},
    )
    assert read_cells(plan).missing == ("local-s7-r0.1",)  # nobody has looked at the weights
    with pytest.raises(RunFolderError) as caught:
        run_cells(plan, told)
    said = str(caught.value).splitlines()[1]
    assert said == "  fedavg-s7-r0.1: another backbone, or the same in another precision"
    assert told.began == []


def test_cells_of_two_backbones_do_not_stand_side_by_side(cells: Path, tmp_path: Path) -> None:
    shutil.copytree(cells, tmp_path / "copy")
    change(tmp_path / "copy", "UPDATE run SET value = 'x' WHERE key = 'backbone'", "local-s7-r0.1")
    plan = plan_in(tmp_path / "b", output=tmp_path / "copy", **ONE)
    told = "local-s7-r0.1: another backbone, or the same in another precision"
    assert misfits(plan) == [told]


# --- ledgers that were made to deceive --------------------------------------------------------


def change(folder: Path, statement: str, cell: str = "fedavg-s7-r0.1") -> None:
    with closing(sqlite3.connect(folder / "cells" / cell / "federation.sqlite")) as ledger:
        ledger.execute("PRAGMA foreign_keys = OFF")
        ledger.executescript(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM scores WHERE client = 'bob' AND candidate = 'base'",
        "DELETE FROM choices WHERE client = 'bob'",
        "UPDATE scores SET nll = 9e999",
        "UPDATE scores SET rows = -1",
        "UPDATE run SET value = '' WHERE key = 'own_candidate'",
        "DELETE FROM run WHERE key = 'own_candidate'",
    ],
)
def test_a_finished_run_without_its_scores_is_refused(
    cells: Path, tmp_path: Path, statement: str
) -> None:
    shutil.copytree(cells, tmp_path / "copy")
    change(tmp_path / "copy", statement)
    plan = plan_in(tmp_path / "b", output=tmp_path / "copy", **ONE)
    told = "its ledger does not hold the scores of a finished run"
    assert misfits(plan) == [f"fedavg-s7-r0.1: {told}"]


@pytest.mark.parametrize(
    "statement", ["UPDATE choices SET candidate = 'nobody'", "UPDATE choices SET round = 77"]
)
def test_a_choice_of_what_was_not_scored_is_refused(
    cells: Path, tmp_path: Path, statement: str
) -> None:
    shutil.copytree(cells, tmp_path / "copy")
    change(tmp_path / "copy", statement)
    [told] = misfits(plan_in(tmp_path / "b", output=tmp_path / "copy", **ONE))
    assert "not a ledger as pfl-lm writes it" in told


def test_a_table_that_takes_anything_is_refused(cells: Path, tmp_path: Path) -> None:
    shutil.copytree(cells, tmp_path / "copy")
    loose = "CREATE TABLE loose AS SELECT * FROM scores; DROP TABLE scores; "
    change(tmp_path / "copy", loose + "ALTER TABLE loose RENAME TO scores")
    [told] = misfits(plan_in(tmp_path / "b", output=tmp_path / "copy", **ONE))
    assert told.startswith("fedavg-s7-r0.1: ")
    assert told.endswith("federation.sqlite: not a ledger as pfl-lm writes it")


def test_what_is_no_ledger_is_refused(cells: Path, tmp_path: Path) -> None:
    shutil.copytree(cells, tmp_path / "copy")
    path = tmp_path / "copy" / "cells" / "fedavg-s7-r0.1" / "federation.sqlite"
    path.write_bytes(b"not a database" * 100)
    [told] = misfits(plan_in(tmp_path / "b", output=tmp_path / "copy", **ONE))
    assert told.startswith(f"fedavg-s7-r0.1: {path}: not a ledger that can be read: ")


def test_a_ledger_that_is_a_link_is_refused(cells: Path, tmp_path: Path) -> None:
    shutil.copytree(cells, tmp_path / "copy")
    path = tmp_path / "copy" / "cells" / "fedavg-s7-r0.1" / "federation.sqlite"
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    [told] = misfits(plan_in(tmp_path / "b", output=tmp_path / "copy", **ONE))
    assert told.endswith("a link; a run folder's ledger is a file in it")


# --- names and digests ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.004, "0.004"), (20.0, "20"), (1e-5, "1e-05"), (1e30, "1e30"), (0.1 + 0.2, repr(0.1 + 0.2))],
)
def test_a_rate_in_a_name_is_that_rate_and_no_other(rate: float, text: str) -> None:
    assert plain_rate(rate) == text
    assert float(text) == rate


def test_a_digest_is_of_what_must_be_equal_and_of_nothing_else(tmp_path: Path) -> None:
    path = tiny_recipe(tmp_path)

    def made(*overrides: str, rows: str = "r", backbone: str = "b") -> str:
        return digest(load_recipe(path, overrides).recipe, {"alice": rows}, backbone)

    def all_made(changes: Sequence[str]) -> set[str]:
        return {made(*each.split()) for each in changes}

    one = made()
    assert all_made(
        [
            "name=other seed=8",
            "method.name=fedavg",
            "training.learning_rate=3.0",
            "runtime.threads=2",
            "federation.min_clients=2",
            "data.path=elsewhere.jsonl",
        ]
    ) == {one}
    apart = all_made(
        [
            *("federation.rounds=3", "federation.fraction_train=0.5", "training.max_steps=3"),
            *("training.per_device_train_batch_size=1", "adapter.r=4", "data.max_length=64"),
            *("data.validation_fraction=0.3", "adapter.lora_dropout=0.1"),
        ]
    )
    apart |= {made(rows="s"), made(backbone="c")}
    assert one not in apart
    assert len(apart) == 10

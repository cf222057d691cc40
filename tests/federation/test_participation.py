"""Whole runs in which only some clients take part: as drawn, as planned, and always the same."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pfl_lm.cli.app import app
from pfl_lm.federation.cohort import Cohorts
from pfl_lm.federation.watch import Watch, Workload
from pfl_lm.finetune import finetune
from pfl_lm.plan import make_plan
from pfl_lm.preflight import check_recipe
from tests.tiny import client_rows, tiny_recipe, write_jsonl

TRACE = "round,client\n1,alice\n1,bob\n1,carol\n2,carol\n3,bob\n3,carol\n"
REACHED = ["abc", "c", "bc", "abc", "c"]


class Steps(Watch):
    """Counts the steps that were announced and those that were taken."""

    announced = 0
    taken = 0

    def begin(self, workload: Workload) -> None:
        self.announced = workload.steps

    def step(self) -> None:
        self.taken += 1


def recipe_in(folder: Path, **changes: Any) -> Path:
    """Write a recipe of five rounds on three clients of unequal size, one of which is often away.

    The trace is named relative to the recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trace.csv").write_text(TRACE, encoding="utf-8")
    rows = [*client_rows(("alice", "bob")), *client_rows(("carol",), n_rows=24)]
    settings = {
        "data.path": str(write_jsonl(folder / "rows.jsonl", rows)),
        "training.max_steps": None,
        "training.local_epochs": 1,
        "federation.rounds": 5,
        "federation.availability": "trace.csv",
        "federation.clients_per_round": 2,
        "federation.sampling": "examples",
        "federation.seed": 3,
    }
    return tiny_recipe(folder, **settings | changes)


def cohorts_of(folder: Path) -> list[list[str]]:
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        rows = ledger.execute("SELECT round, client FROM cohorts ORDER BY round, client")
        drawn: dict[int, list[str]] = {}
        for round, client in rows:
            drawn.setdefault(round, []).append(client)
        return [drawn[round] for round in sorted(drawn)]


@pytest.mark.parametrize("method", ["pflalign", "fedavg"])
def test_a_run_is_drawn_from_those_who_can_be_reached_and_as_planned(
    tmp_path: Path, method: str
) -> None:
    checked = check_recipe(recipe_in(tmp_path, **{"method.name": method}))
    plan, watch = make_plan(checked.loaded, checked.clients), Steps()

    folder = finetune(checked.loaded, watch, checked.clients).folder

    drawn = cohorts_of(folder)
    sizes = {client.id: client.train for client in plan.clients}
    assert (sizes["alice"], sizes["bob"], sizes["carol"]) == (5, 5, 16)
    assert drawn == Cohorts.of(checked.loaded.recipe, sizes).all()
    assert [len(chosen) for chosen in drawn] == [2, 1, 2, 2, 1]
    for chosen, reached in zip(drawn, REACHED, strict=True):
        assert {client[0] for client in chosen} <= set(reached)
    assert plan.in_round == (1, 2)
    assert plan.steps == watch.announced == watch.taken > 0
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(plan.disk.files) == files


def test_the_resolved_recipe_draws_the_same_from_anywhere(tmp_path: Path) -> None:
    first = finetune(check_recipe(recipe_in(tmp_path / "a")).loaded).folder
    (tmp_path / "b").mkdir()
    copy = tmp_path / "b" / "recipe.yaml"
    copy.write_bytes((first / "recipe.resolved.yaml").read_bytes())
    again = finetune(check_recipe(copy, ["name=again"]).loaded).folder
    assert cohorts_of(first) == cohorts_of(again)
    weights = "adapters/carol/adapter_model.safetensors"
    assert (first / weights).read_bytes() == (again / weights).read_bytes()


def test_a_plan_says_how_many_there_are_in_a_round(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(recipe_in(tmp_path))])
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert (
        "traffic 14.3 kB to 28.7 kB up and 14.3 kB to 28.7 kB down a round, 1 to 2 of 3 clients"
        in lines
    )


def test_validate_refuses_a_trace_too_thin_with_2(tmp_path: Path) -> None:
    recipe = str(recipe_in(tmp_path))
    result = CliRunner().invoke(app, ["validate", recipe, "federation.min_clients=2"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        "federation.min_clients: round 2 would have 1 of the 1 that can be reached then, and needs "
        "2\n" in result.stderr
    )
    assert f"or name more clients of round 2 in {tmp_path}/trace.csv" in result.stderr
    assert CliRunner().invoke(app, ["validate", recipe]).exit_code == 0

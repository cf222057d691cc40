"""`pfl-lm diagnose`: what it shows, and the one file it writes."""

from __future__ import annotations

import csv
import json
import sqlite3
from contextlib import closing
from pathlib import Path

from typer.testing import CliRunner

from pfl_lm.cli.app import app
from pfl_lm.export.plan import plan_push
from pfl_lm.membership import remove
from tests.cli.diagnosed import CSV, FAR, ON, cli, words
from tests.interruptions import go_on, stopped, whole
from tests.same import check_same, facts_in, files_in


def test_the_file_is_what_the_ledger_holds(run: Path) -> None:
    before, facts = files_in(run), facts_in(run)
    code, _, stderr = cli(run, "--no-bound")
    assert (code, stderr) == (0, "")
    after = files_in(run)
    assert after.keys() - before.keys() == {CSV}
    assert {name for name in before if before[name] != after[name]} <= {"federation.sqlite"}
    assert facts_in(run) == facts
    with (run / CSV).open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["round", "client", "layer", "quantity", "value"]
    with closing(sqlite3.connect(run / "federation.sqlite")) as ledger:
        turns = ledger.execute("SELECT round, client, summary FROM turns").fetchall()
    noted = {
        (str(round), client, name.split("/")[2], name.split("/")[1]): value
        for round, client, summary in turns
        for name, value in json.loads(summary).items()
        if name.startswith("diagnostics/")
    }
    assert {tuple(row[:4]): float(row[4]) for row in rows[1:]} == noted
    assert len(rows) - 1 == len(noted) > 100
    assert [row[:2] for row in rows[1:]] == sorted(row[:2] for row in rows[1:])


def test_the_tables_are_means_over_clients(run: Path) -> None:
    _, stdout, _ = cli(run, "--no-bound")
    with (run / CSV).open(newline="") as file:
        rows = list(csv.DictReader(file))

    def mean(round: int, layer: str, quantity: str) -> str:
        at = (str(round), layer, quantity)
        found = [
            float(row["value"])
            for row in rows
            if (row["round"], row["layer"], row["quantity"]) == at
        ]
        assert len(found) == (0 if (round, quantity) == (1, "cosine") else 3)
        return f"{sum(found) / len(found):.2g}" if found else ""

    shown = (
        *("preconditioner_mean", "gamma_mean", "gamma_std", "offset_norm"),
        *("gradient_variance", "step_variance", "cosine", "drift"),
    )
    lines = words(stdout)
    assert "round clients P γ γ std ‖Δ‖ var g var step cos drift" in lines
    for round in (1, 2):
        numbers = [mean(round, "all", quantity) for quantity in shown]
        assert " ".join([str(round), "3", *filter(None, numbers)]) in lines
    assert "round 2, layer by layer: means over the clients" in lines
    for layer in ("0", "1"):
        assert " ".join([layer, *(mean(2, layer, quantity) for quantity in shown)]) in lines
    assert lines[-2] == f"{run / CSV} every round, client and layer"
    _, first, _ = cli(run, "--no-bound", "--round", 1)
    assert "round 1, layer by layer: means over the clients" in words(first)


def test_no_number_is_cut_short_in_a_pipe(run: Path) -> None:
    for option in ("--no-bound", "--samples=1"):
        _, stdout, _ = cli(run, option)
        assert "…" not in stdout


def test_a_run_that_has_noted_nothing_says_what_to_type(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    code, stdout, stderr = cli(folder, "--no-bound")
    assert (code, stderr) == (0, "")
    command = (
        f"pfl-lm finetune {folder}/recipe.resolved.yaml name=tiny-diagnosed "
        "runtime.diagnostics=true"
    )
    assert words(stdout)[:2] == [
        f"{folder}: no turn of this run has noted diagnostics",
        f"next: they are noted by a run of its own, with the same results: {command}",
    ]
    assert not (folder / CSV).exists()
    done = CliRunner().invoke(app, command.split()[1:])
    assert done.exit_code == 0
    other = folder.parent / "tiny-diagnosed"
    assert cli(other, "--no-bound")[0] == 0
    adapter = "adapters/alice/adapter_model.safetensors"
    assert (other / adapter).read_bytes() == (folder / adapter).read_bytes()


def test_an_interrupted_run_is_shown_and_then_ends_as_it_would_have(
    tmp_path: Path, kept: Path
) -> None:
    folder = stopped(tmp_path, 22, **ON, **FAR)
    code, stdout, stderr = cli(folder)
    assert (code, stderr) == (0, "")
    assert words(stdout)[-2:] == [
        "PAC-Bayes style figures are for a finished run; this one has more to do",
        f"next: pfl-lm resume {folder}",
    ]
    some = (folder / CSV).read_text()
    go_on(folder)
    assert (folder / CSV).read_text() == some  # as of when it was looked at
    cli(folder, "--no-bound")
    assert len((folder / CSV).read_text()) > len(some)
    check_same(folder, kept, apart=(CSV,))


def test_it_may_be_turned_on_for_the_rest_of_a_run(tmp_path: Path, kept: Path) -> None:
    folder = stopped(tmp_path, 26, **FAR)
    recipe = str(folder.parents[1] / "recipe.yaml")
    done = CliRunner().invoke(app, ["finetune", recipe, "--resume", "runtime.diagnostics=true"])
    assert done.exit_code == 0, done.stderr
    assert cli(folder, "--no-bound")[0] == 0
    with (folder / CSV).open(newline="") as file:
        noted = {(row["round"], row["client"]) for row in csv.DictReader(file)}
    assert 3 <= len(noted) < 6
    assert {("2", client) for client in ("alice", "bob", "carol")} <= noted
    weights = "adapters/bob/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (kept / weights).read_bytes()


def test_nothing_of_it_is_pushed(run: Path) -> None:
    before = {file.path for file in plan_push(run, "org/name", remote=None).files}
    cli(run, "--no-bound")
    assert {file.path for file in plan_push(run, "org/name", remote=None).files} == before


def test_who_is_removed_is_gone_from_the_file(run: Path) -> None:
    cli(run, "--no-bound")
    lines = (run / CSV).read_text().splitlines()
    remove(run, "bob")
    left = (run / CSV).read_text().splitlines()
    assert left == [line for line in lines if ",bob," not in line]
    assert 1 < len(left) < len(lines)


def test_with_replay_the_file_goes(run: Path) -> None:
    cli(run, "--no-bound")
    remove(run, "bob", replay=True)
    assert not (run / CSV).exists()


def test_removing_makes_no_file(run: Path) -> None:
    remove(run, "bob")
    assert not (run / CSV).exists()

"""`pfl-lm diagnose`: what it shows, the one file it writes, and what it refuses."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from typer.testing import CliRunner

import pfl_lm.diagnose
from pfl_lm.cli.app import app
from pfl_lm.diagnose import client_figures
from pfl_lm.evaluate.pac_bayes import SIGMAS, figure, fixed_model_figure, least_figure
from pfl_lm.export.plan import plan_push
from pfl_lm.federation.lock import run_lock
from pfl_lm.finetune import finetune
from pfl_lm.membership import remove
from pfl_lm.recipe import load_recipe
from pfl_lm.resume import run_recipe
from tests.same import check_same, facts_in, files_in
from tests.test_resume import go_on, stopped, whole
from tests.tiny import client_rows, tiny_recipe, write_jsonl

ON = {"runtime.diagnostics": True}
FAR = {"training.learning_rate": 5.0}  # so that adapters are well away from where they began
CSV = "diagnostics.csv"


def cli(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["diagnose", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def words(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def change(folder: Path, statement: str, *given: Any) -> None:
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        ledger.execute(statement, given)
        ledger.commit()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has noted diagnostics. Copy it, or read it only."""
    return whole(tmp_path_factory.mktemp("kept"), **ON, **FAR)


@pytest.fixture
def run(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "run"))


# --- what was noted ---------------------------------------------------------------------------


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


# --- the figures ------------------------------------------------------------------------------


def test_the_figures_come_from_the_exported_adapters(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rows are claimed, and errors given, so that the figures are not all 1."""
    asked: list[tuple[float, int]] = []

    def noisy(*_: Any, sigma: float, samples: int, **__: Any) -> float:
        asked.append((sigma, samples))
        return 0.2 if sigma < 0.1 else 0.9

    monkeypatch.setattr(pfl_lm.diagnose, "noisy_token_error", noisy)
    monkeypatch.setattr(pfl_lm.diagnose, "token_error", lambda *_, **__: 0.3)
    monkeypatch.setattr(pfl_lm.diagnose._Rows, "n", 5000)
    found = list(client_figures(run_recipe(run), 4, lambda text: None))
    assert [each.client for each in found] == ["alice", "bob", "carol"]
    for each in found:
        figures = {
            sigma: figure(
                0.2 if sigma < 0.1 else 0.9,
                4 * 5000,
                each.distance**2 / 2 / sigma**2,
                5000,
            )
            for sigma in SIGMAS
        }
        assert each.sigma == min(figures, key=lambda sigma: figures[sigma])
        assert each.figure == pytest.approx(min(figures.values()))
        assert each.error == 0.2
        assert each.divergence == pytest.approx(each.distance**2 / 2 / each.sigma**2)
        assert each.backbone == fixed_model_figure(0.3, 5000)
    # σ that could not have given less were not measured.
    assert 3 <= len(asked) < 3 * len(SIGMAS)
    assert {samples for _, samples in asked} == {4}
    assert 0.001 not in {sigma for sigma, _ in asked}
    assert least_figure(found[0].distance ** 2 / 2 / 0.001**2, 5000) > found[0].figure


def test_distances_are_to_the_adapter_that_the_run_began_with(run: Path, tmp_path: Path) -> None:
    """A run that changes nothing keeps the untouched adapter: it is at distance 0, and its KL 0."""
    still = whole(tmp_path / "still", **{"training.learning_rate": 1e-30})
    start = load_file(still / "adapters" / "alice" / "adapter_model.safetensors")
    for each in client_figures(run_recipe(still), 1, lambda text: None):
        assert (each.candidate, each.distance, each.divergence) == ("base", 0.0, 0.0)
        assert each.error is not None
    for each in client_figures(run_recipe(run), 1, lambda text: None):
        w = load_file(run / "adapters" / each.client / "adapter_model.safetensors")
        squares = [float((w[key].double() - start[key].double()).square().sum()) for key in w]
        assert each.distance == pytest.approx(sum(squares) ** 0.5, rel=1e-9)
        assert each.distance > 0.1


def test_the_figures_are_shown_with_what_they_are_not(run: Path) -> None:
    code, stdout, stderr = cli(run, "--samples", 1)
    assert (code, stderr) == (0, "")
    lines = words(stdout)
    assert "client its model rows ‖w-w₀‖ σ KL error figure backbone" in lines
    [alice] = [line for line in lines if line.startswith("alice ")]
    # Five rows: not even without an error would the figure be small, and a random model errs.
    assert alice.startswith("alice realigned 5 ")
    assert alice.endswith(" 1.000 1.000 vacuous")
    assert "3 of 3 figures are vacuous" in lines
    assert "NOT the bound of the pFLAlign paper" in stdout
    assert "With probability 0.95" in stdout
    assert cli(run, "--samples", 1)[1] == stdout


@pytest.mark.parametrize(
    ("candidate", "value", "verdict"),
    [
        ("local", 1.0, "vacuous"),
        ("local", 0.9991, "vacuous"),
        ("local", 0.7, "not vacuous, but above the backbone's"),
        ("local", 0.5, "not vacuous, and below the backbone's"),
        ("base", 0.7, "not vacuous; it keeps the backbone"),
    ],
)
def test_verdicts(candidate: str, value: float, verdict: str) -> None:
    each = pfl_lm.diagnose.ClientFigure("a", candidate, 9, 0.1, 0.1, 1.0, 0.2, value, 0.6)
    assert each.verdict == verdict


def test_no_figures_where_noise_protects_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    lever = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-3}
    folder = whole(tmp_path, **{"privacy.record_level": lever})
    code, stdout, _ = cli(folder)
    assert code == 0
    lines = words(stdout)
    assert (
        "next: none can be: `privacy.record_level` does not account for what they would tell"
        in (lines)
    )
    assert lines[-2:] == [
        "no PAC-Bayes style figures: they read the train rows without noise, which",
        "`privacy.record_level` does not account for",
    ]


# --- what is refused --------------------------------------------------------------------------


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    code, _, stderr = cli(tmp_path / "none")
    assert code == 2
    assert stderr.startswith(f"{tmp_path}/none: there is no such folder\n  hint: start one with ")
    code, _, stderr = cli(tmp_path)
    assert code == 2
    assert stderr.startswith(f"{tmp_path}: no run has begun in this folder\n")


def test_a_round_that_is_not_there(run: Path) -> None:
    code, _, stderr = cli(run, "--no-bound", "--round", 9)
    assert code == 2
    assert stderr == (
        "--round: no turn of round 9 has noted diagnostics\n"
        "  hint: those that have are of 2 rounds, 1 to 2\n"
    )
    assert not (run / CSV).exists()


def test_a_run_that_another_process_is_at(run: Path) -> None:
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with run_lock(run):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        code, _, stderr = cli(run)
        assert code == 2
        assert f"{run}: another process is at work in this run folder" in stderr
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
    assert not (run / CSV).exists()


def test_an_adapter_that_is_not_the_indexs(run: Path) -> None:
    path = run / "adapters" / "bob" / "adapter_model.safetensors"
    path.write_bytes((run / "adapters" / "alice" / path.name).read_bytes())
    code, stdout, stderr = cli(run, "--samples", 1)
    assert code == 2
    assert stderr.startswith(
        f"{path}: not the adapter that adapters.json names (SHA-256 differs)\n"
    )
    assert "round 2, layer by layer" in stdout
    assert (run / CSV).exists()


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"a": torch.zeros(1)}, "not an adapter as this run's recipe makes it; these differ: 'a',"),
        (None, "no safetensors file: "),
        ("nan", "holds numbers that are not finite"),
    ],
)
def test_an_adapter_that_is_none(run: Path, tensors: Any, told: str) -> None:
    path = run / "adapters" / "alice" / "adapter_model.safetensors"
    if tensors == "nan":
        tensors = {key: x * torch.nan for key, x in load_file(path).items()}
    content = b"nothing" if tensors is None else save(tensors)
    path.write_bytes(content)
    index = json.loads((run / "adapters.json").read_text())
    index["clients"]["alice"]["sha256"] = hashlib.sha256(content).hexdigest()
    (run / "adapters.json").write_text(json.dumps(index))
    code, _, stderr = cli(run, "--samples", 1)
    assert code == 2
    assert stderr.startswith(f"{path}: {told}")


def test_an_index_of_strangers(run: Path) -> None:
    text = (run / "adapters.json").read_text().replace('"alice": {', '"mallory": {', 1)
    (run / "adapters.json").write_text(text)
    code, _, stderr = cli(run, "--samples", 1)
    assert code == 2
    assert stderr == f"{run}: adapters.json has 'mallory', no client of this run\n"


def test_rows_that_have_changed(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    rows = tmp_path / "clients.jsonl"
    rows.write_text(rows.read_text().replace("apple", "maple"))
    code, _, stderr = cli(folder, "--samples", 1)
    assert code == 2
    assert "client 'alice': its rows are not those the run began with" in stderr
    assert cli(folder, "--no-bound")[0] == 0


@pytest.mark.parametrize("name", ["adapters", "clients", "adapters/alice", "global"])
def test_links_are_not_followed(run: Path, tmp_path: Path, name: str) -> None:
    (run / name).rename(tmp_path / "aside")
    (run / name).symlink_to(tmp_path / "aside")
    code, _, stderr = cli(run)
    assert code == 2
    assert "links in a run folder are not followed" in stderr
    assert not (run / CSV).exists()


def test_a_link_in_the_files_place_is_replaced(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("other")
    (run / CSV).symlink_to(other)
    assert cli(run, "--no-bound")[0] == 0
    assert other.read_text() == "other"
    assert not (run / CSV).is_symlink()


@pytest.mark.parametrize("value", ["x", [1.0], None, {"a": 1}, True])
def test_a_summary_that_is_not_numbers_is_refused(run: Path, value: object) -> None:
    text = json.dumps({"diagnostics/drift/all": value})
    change(run, "UPDATE turns SET summary = ? WHERE client = 'bob'", text)
    code, _, stderr = cli(run)
    assert code == 2
    assert "a turn's summary is not numbers by name" in stderr


def test_strange_names_and_numbers_are_neither_shown_nor_written(run: Path) -> None:
    strange = {
        "diagnostics/drift/\x1b[2J": 1.0,
        "diagnostics/\x1b[31mdrift/all": 1.0,
        "diagnostics/drift/" + "9" * 100_000: 1.0,
        "\x1b]0;title\x07": 2.0,
        "diagnostics/cosine/all": float("nan"),
        "diagnostics/gamma_mean/0": 10**400,
        "diagnostics/gamma_std/all": float("inf"),
        "diagnostics/offset_norm/0": 1.7e308,
        "diagnostics/drift/all": 0.5,
    }
    change(run, "UPDATE turns SET summary = ?", json.dumps(strange))
    code, stdout, stderr = cli(run, "--no-bound")
    assert (code, stderr) == (0, "")
    assert all(c == "\n" or c.isprintable() for c in stdout)
    rows = (run / CSV).read_text().splitlines()[1:]
    kept = {"all,drift,0.5", "0,offset_norm,1.7e+308"}
    assert {row.split(",", 2)[2] for row in rows} == kept
    assert len(rows) == 2 * 3 * 2


def test_a_clients_id_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    name = "mal\u202elory\u2028" + "x" * 500
    data = write_jsonl(tmp_path / "rows.jsonl", client_rows(("alice", name)))
    recipe = tiny_recipe(
        tmp_path, **ON, **{"data.path": str(data), "federation.rounds": 1, "data.max_length": 2000}
    )
    folder = finetune(load_recipe(recipe)).folder
    code, stdout, stderr = cli(folder, "--samples", 1)
    assert (code, stderr) == (0, "")
    assert all(c == "\n" or c.isprintable() for c in stdout)
    assert r"mal\u202elory\u2028xxx" in stdout
    assert "x" * 200 not in stdout
    with (folder / CSV).open(newline="", encoding="utf-8") as file:
        assert {row["client"] for row in csv.DictReader(file)} == {"alice", name}

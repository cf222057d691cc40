from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfl_lm.cli.app import app
from pfl_lm.cli.plan import size
from pfl_lm.privacy.spent import said, spent
from pfl_lm.recipe import load_recipe
from pfl_lm.recipe.yaml12 import read_yaml
from tests.tiny import client_rows, tiny_recipe, write_jsonl


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def without_sizes(text: str) -> str:
    """Leave out what the process itself weighs, which grows while tests run."""
    return re.sub(r"[\d.]+ [kMG]?B", "", text)


@pytest.fixture
def plan(tmp_path: Path) -> str:
    code, stdout, stderr = run("plan", str(tiny_recipe(tmp_path)), "federation.rounds=3")
    assert (code, stderr) == (0, "")
    return stdout


def test_a_plan_says_what_a_run_would_be(plan: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    lines = [" ".join(line.split()) for line in plan.splitlines()]
    assert lines[0] == f"tiny: pflalign, into {folder}"
    assert "client train validation test tokens cut dropped steps" in lines
    assert any(line.startswith("alice 5 1 2 ") and line.endswith(" 0 0 2") for line in lines)
    assert any(line.startswith("all 15 3 6 ") and line.endswith(" 0 0 6") for line in lines)
    assert "backbone 91,456 parameters, 366 kB as float32, on cpu" in lines
    assert "adapter 3,584 parameters, 14.3 kB, on 4 matrices" in lines
    assert (
        "state 57.3 kB a client stays with it: offset, preconditioner, second_moment, weights"
        in lines
    )
    assert "traffic 43 kB up and 43 kB down a round, 3 of 3 clients" in lines
    assert "work 18 optimizer steps in all" in lines
    ranks = "up to 3 ranks would take clients of their own, more than 3 ranks would share each"
    assert f"ranks {ranks} client's turn" in lines
    assert any(line.startswith("memory about ") for line in lines)
    assert "clients/carol/state-3.safetensors" in lines
    assert lines[-1] == (
        f"Nothing was written. Next: pfl-lm finetune {tmp_path}/recipe.yaml federation.rounds=3"
    )


def test_nothing_is_written(plan: str, tmp_path: Path) -> None:
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clients.jsonl", "recipe.yaml"]


def test_the_resolved_recipe_is_shown_whole(plan: str, tmp_path: Path) -> None:
    shown = plan.split("filled in:\n\n")[1].split("\n\n")[0]
    loaded = load_recipe(tmp_path / "recipe.yaml", ["federation.rounds=3"])
    assert "\n".join(line[2:] for line in shown.splitlines()) + "\n" == loaded.resolved()
    assert read_yaml(shown.encode(), "shown").data["federation"] == {
        "rounds": 3,
        "fraction_train": 1.0,
        "clients_per_round": None,
        "sampling": "uniform",
        "availability": None,
        "min_clients": 1,
        "seed": None,
    }


def test_a_dry_run_is_a_plan(plan: str, tmp_path: Path) -> None:
    recipe = str(tmp_path / "recipe.yaml")
    code, stdout, _ = run("finetune", "--dry-run", recipe, "federation.rounds=3")
    assert code == 0
    assert without_sizes(stdout) == without_sizes(plan)
    assert not (tmp_path / "runs").exists()


def test_a_pipe_gets_plain_text(plan: str) -> None:
    assert "\x1b" not in plan


def test_what_a_run_would_refuse_leaves_with_2(tmp_path: Path) -> None:
    recipe = str(tiny_recipe(tmp_path))
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "x").touch()
    for verb in (["plan"], ["finetune", "--dry-run"]):
        code, _, stderr = run(*verb, recipe)
        assert code == 2
        assert "this run folder already holds a run" in stderr
    code, _, stderr = run("plan", recipe, "name=other", "adapter.target_modules=[c_attn]")
    assert code == 2
    assert "adapter.target_modules: 'c_attn' not in this backbone" in stderr


def test_names_in_a_plan_are_text(tmp_path: Path) -> None:
    rows = client_rows(["[red]x", "a\u202eb", "[/b]"])
    recipe = tiny_recipe(tmp_path, **{"data.path": str(write_jsonl(tmp_path / "r.jsonl", rows))})
    code, stdout, _ = run("plan", str(recipe))
    assert code == 0
    assert "[red]x " in stdout
    assert "[/b] " in stdout
    assert "a\\u202eb " in stdout
    assert "\u202e" not in stdout


def test_many_clients_and_files_are_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfl_lm.cli.plan.MOST_CLIENTS", 2)
    monkeypatch.setattr("pfl_lm.cli.plan.MOST_FILES", 7)
    _, stdout, _ = run("plan", str(tiny_recipe(tmp_path)))
    assert "and 1 more" in stdout
    assert "carol" not in stdout
    assert re.search(r"^ all +15 ", stdout, re.MULTILINE)
    assert "  and 14 more\n" in stdout


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (614_400, "614 kB"),
        (1_383_000_000, "1.38 GB"),
        (99_960_000, "100 MB"),
        (12_345_678_901_234, "12300 GB"),
    ],
)
def test_sizes_have_three_digits(n: int, said: str) -> None:
    assert size(n) == said


def test_a_rule_of_aggregation_is_shown_and_told_if_it_leaves_nobody_out(tmp_path: Path) -> None:
    recipe = str(tiny_recipe(tmp_path))
    code, stdout, _ = run("plan", recipe, "aggregation.rule=trimmed_mean")
    assert code == 0
    assert "\n  aggregation:\n    rule: trimmed_mean\n" in stdout
    assert "    trim_fraction: 0.1\n" in stdout
    assert (
        "\naggregation.rule: with 3 uploads a round, trimmed_mean cuts floor(0.1 * 3) = 0: it is "
        "their unweighted mean\n"
    ) in stdout
    fraction = "aggregation.trim_fraction=0.4"
    _, stdout, _ = run("plan", recipe, "aggregation.rule=trimmed_mean", fraction)
    assert "aggregation.rule: with" not in stdout


def test_local_refuses_a_rule(tmp_path: Path) -> None:
    recipe = str(tiny_recipe(tmp_path))
    code, _, stderr = run("validate", recipe, "method.name=local", "aggregation.rule=median")
    assert code == 2
    assert "`local` sends nothing to the server, so no rule has anything to work on" in stderr


def test_a_plan_says_what_privacy_would_be_spent(plan: str, tmp_path: Path) -> None:
    assert "differential" not in plan
    assert not [line for line in plan.splitlines() if line.startswith("privacy    ")]
    levers = (
        "privacy.record_level={noise_multiplier: 1.0, max_grad_norm: 1.0, delta: 1e-3}",
        "privacy.client_level={noise_multiplier: 2.0, clip_norm: 1.0, delta: 1e-2}",
    )
    code, stdout, _ = run(
        "plan", str(tmp_path / "recipe.yaml"), *levers, "method.weighting=uniform"
    )
    assert code == 0
    rows = said(spent({(1.0, 2 / 5): 4}, 1e-3))
    clients = said(spent({(2.0, 1.0): 2}, 1e-2))
    assert (
        f"privacy    rows, {rows}; clients, {clients}: the most of any client, after all rounds"
    ) in stdout

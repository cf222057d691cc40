"""``pfl-lm bench`` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pfl_lm.bench.memory import peaks
from pfl_lm.bench.ways import AGAINST
from pfl_lm.cli.app import app
from pfl_lm.errors import PflError
from pfl_lm.recipe.shipped import shipped
from tests.bench.cases import TOP
from tests.cli.test_app import run_alone
from tests.tiny import tiny_recipe, write_jsonl


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def done(folder: Path) -> tuple[str, dict[str, Any]]:
    """What a bench prints and what it writes, on the tiny backbone."""
    recipe = str(tiny_recipe(folder, **TOP))
    file = folder / "numbers.json"
    code, stdout, stderr = run(
        recipe, "seed=3", "--repeats", "3", "--steps", "3", "--no-memory", "--json", str(file)
    )
    assert (code, stderr) == (0, "")
    return stdout, json.loads(file.read_text(encoding="utf-8"))


WAYS = [
    *("pfl-lm", "pfl-lm, rows new", "pfl-lm, no trunk", "fit", "loop, same loss", "loop"),
    *("loop, all layers", "trainer", "reload"),
]


def test_the_tables_have_every_way(done: tuple[str, dict[str, Any]], folder: Path) -> None:
    lines = done[0].splitlines()
    assert lines[0] == "loading the backbone onto cpu"
    assert lines[1].startswith("tiny: a turn of pflalign, 3 steps of 2 rows of ")
    assert lines[1].endswith(", adapters in 1 layer; float32 on cpu, 1 thread")
    for way in WAYS:
        rows = [line for line in lines if line.startswith(f" {way}  ")]
        assert len(rows) == 2, way
    assert "LocalTrainer.train takes " in done[0]
    assert ", and ends at the same bits." in done[0]
    assert lines[-1] == f"Next: pfl-lm plan {folder / 'recipe.yaml'} seed=3"
    assert "\x1b" not in done[0]
    assert "train_runtime" not in done[0]
    assert "…" not in done[0]


def test_nothing_is_written_but_the_file(done: tuple[str, dict[str, Any]], folder: Path) -> None:
    there = sorted(path.name for path in folder.iterdir())
    assert there == ["clients.jsonl", "numbers.json", "recipe.yaml"]


def test_the_file_has_everything(done: tuple[str, dict[str, Any]], folder: Path) -> None:
    found = done[1]
    assert found["path"] == str(folder / "recipe.yaml")
    assert found["overrides"] == ["seed=3"]
    assert (found["recipe"], found["method"], found["layers"]) == ("tiny", "pflalign", [1])
    assert (found["steps"], found["rows_in_step"], found["rows"]) == (3, 2, 5)
    assert (found["repeats"], found["dtype"], found["device"]) == (3, "float32", "cpu")
    assert found["ratios_by"] == "cpu"
    assert found["fit_ends_at_the_loops_bits"] is True
    assert found["tokens"] > found["supervised"] > 0
    assert found["matmul_flops_per_second"] > 1e8
    assert {"processor", "cores", "threads", "load", "date", "torch"} <= found["machine"].keys()
    assert list(found["ways"]) == WAYS


def test_a_ways_numbers_fit_together(done: tuple[str, dict[str, Any]]) -> None:
    ways = done[1]["ways"]
    for name, way in ways.items():
        turn, step, fixed = way["turn_ms"], way["step_ms"], way["fixed_ms"]
        assert turn["times"] == step["times"] == fixed["times"] == len(way["all"]["wall_ms"]) == 3
        assert turn["wall_least"] <= turn["wall_median"] <= turn["wall_most"]
        assert turn["wall_median"] == sorted(way["all"]["wall_ms"])[1]
        assert way["turns_per_hour"] == pytest.approx(3.6e6 / turn["wall_median"])
        tokens = way["tokens_per_second"] * turn["wall_median"] / 1e3
        assert tokens == pytest.approx(done[1]["tokens"])
        assert way["ratio"]["cpu"] == pytest.approx(
            turn["cpu_median"] / ways["pfl-lm"]["turn_ms"]["cpu_median"]
        )
        rate = way["flops"] / turn["cpu_median"] * 1e3
        assert way["share_of_matmul"] == pytest.approx(rate / done[1]["matmul_flops_per_second"])
        assert way["peak_bytes"] is None
        whole = name.startswith("pfl-lm")
        assert (way["bytes_up"] is not None) == whole
        assert 0 < 3 * step["wall_least"] <= turn["wall_most"]
        assert 0 < fixed["wall_least"] < turn["wall_most"]
    flops = {name: way["flops"] for name, way in ways.items()}
    assert flops["pfl-lm"] == flops["fit"] == flops["loop, same loss"] < flops["pfl-lm, no trunk"]
    assert flops["pfl-lm, no trunk"] == flops["pfl-lm, rows new"] < flops["loop"]
    assert flops["loop"] == flops["trainer"] == flops["reload"] < flops["loop, all layers"]
    for name in ("loop", "trainer", "reload"):
        assert 0 <= ways[name]["distance_from_fit"] < 1e-4
    assert ways["fit"]["distance_from_fit"] == 0
    assert ways["loop, all layers"]["distance_from_fit"] is None


def test_quick_is_quick(tmp_path: Path) -> None:
    recipe = str(tiny_recipe(tmp_path, **{"training.max_steps": 50}))
    file = tmp_path / "numbers.json"
    code, stdout, _ = run(recipe, "--quick", "--against", "loop", "--json", str(file))
    assert code == 0
    found = json.loads(file.read_text())
    assert (found["repeats"], found["steps"]) == (2, 2)
    assert list(found["ways"]) == ["pfl-lm", "fit", "loop, same loss", "loop"]
    assert f"All numbers are in {file}." in stdout


def test_each_ways_memory_is_its_own_processes(tmp_path: Path) -> None:
    held = torch.zeros(500_000_000, dtype=torch.uint8) + 1  # which a child must not be charged for
    recipe = tiny_recipe(tmp_path)
    ways = {"loop": True, "reload": False}
    found = peaks(recipe, [], ways, tmp_path, against=AGAINST, steps=1, threads=1)
    assert found["reload"] is None
    assert found["loop"] is not None
    assert found["loop"] > 50e6
    del held
    assert found["loop"] < 900e6


def test_the_quickstart_is_measured_unless_another_recipe_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def refuse(*given: object, **more: object) -> None:
        asked.append(given)
        raise PflError("seen")

    monkeypatch.setattr("pfl_lm.cli.bench.check_recipe", refuse)
    assert run()[0] == 2
    assert run("seed=3", "adapter.r=4")[0] == 2
    assert run("mine.yaml", "seed=3")[0] == 2
    quickstart = shipped("quickstart.yaml")
    assert quickstart.is_file()
    expected = [
        (quickstart, []),
        (quickstart, ["seed=3", "adapter.r=4"]),
        (Path("mine.yaml"), ["seed=3"]),
    ]
    assert asked == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--against", "lop"], "--against: 'lop' is none of loop, trainer, reload"),
        (["--json", "no/such/folder/x.json"], "--json: no/such/folder/x.json cannot be written"),
        (["--json", "/"], "--json: / is a folder"),
        (["--repeats", "0"], "Invalid value for '--repeats'"),
        (["--steps", "0"], "Invalid value for '--steps'"),
        (["adapter.target_modules=[c_attn]"], "'c_attn' not in this backbone"),
        (["data.max_length=8"], "rows keep a supervised token at max_length 8"),
    ],
)
def test_what_cannot_be_measured_leaves_with_2(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    recipe = str(tiny_recipe(tmp_path))
    code, _, stderr = run(recipe, *arguments)
    assert code == 2
    assert said in stderr
    assert "Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clients.jsonl", "recipe.yaml"]


def test_a_recipe_that_is_not_there_leaves_with_2(tmp_path: Path) -> None:
    code, _, stderr = run(str(tmp_path / "none.yaml"))
    assert code == 2
    assert "none.yaml" in stderr


def test_a_client_without_rows_to_train_on_leaves_with_2(tmp_path: Path) -> None:
    rows = [
        {"client": "alice", "prompt": "Hi", "completion": "Hello.", "split": "test"},
        {"client": "bob", "prompt": "Hi", "completion": "Hello.", "split": "train"},
        {"client": "bob", "prompt": "Ho", "completion": "Hallo.", "split": "train"},
    ]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    code, _, stderr = run(str(tiny_recipe(tmp_path, **{"data.path": path})))
    assert code == 2
    assert "alice" in stderr


def test_help_imports_nothing_heavy() -> None:
    assert run_alone("bench", "--help") == "heavy:"

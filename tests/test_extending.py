"""``docs/extending.md`` works as it stands: its code in its places, in a copy of the package."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pfl_lm.finetune import finetune
from pfl_lm.recipe import load_recipe
from tests.tiny import tiny_recipe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = re.findall(r"^```python\n# (pfl_lm/\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ENTRIES = re.findall(r"^\| `(pfl_lm/\S+)` \| `(.+?)` \| `(.+?)` \|$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a copy of the package to which the page's method was added."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "pfl_lm", folder / "pfl_lm", ignore=shutil.ignore_patterns("__pyc*"))
    for name, code in FILES:
        assert not (folder / name).exists()
        (folder / name).write_text(code, encoding="utf-8")
    for name, below, new in (map(unescaped, entry) for entry in ENTRIES):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        [at] = [i for i, line in enumerate(lines) if line.strip() == below]
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines.insert(at, f"{indent}{new}")
        (folder / name).write_text("\n".join([*lines, ""]), encoding="utf-8")
    return folder


def unescaped(cell: str) -> str:
    return cell.replace("\\|", "|")


def pfl_lm(extended: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pfl_lm", *arguments],
        cwd=extended,
        env=os.environ | {"PYTHONPATH": str(extended), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_two_files_and_five_lines() -> None:
    assert [name for name, _ in FILES] == ["pfl_lm/recipe/blend.py", "pfl_lm/methods/blend.py"]
    assert len(ENTRIES) == 5


def test_its_method_runs_two_rounds(extended: Path, tmp_path: Path) -> None:
    """And is FedAvg on the server; its model lies where it says."""
    recipe = tiny_recipe(tmp_path, **{"method.name": "blend", "method.alpha": 0.25})
    pfl_lm(extended, "finetune", str(recipe))

    run = tmp_path / "runs" / "tiny"
    shared = load_file(run / "server" / "state-2.safetensors")["global_weights"]
    (tmp_path / "fedavg").mkdir()
    fedavg = finetune(load_recipe(tiny_recipe(tmp_path / "fedavg", **{"method.name": "fedavg"})))
    same = load_file(fedavg.folder / "server" / "state-2.safetensors")["global_weights"]
    assert torch.equal(shared, same)
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert {row["candidate"] for row in rows} == {"base", "personal", "global", "local"}
    for client, entry in json.loads((run / "adapters.json").read_text())["clients"].items():
        assert entry["candidate"] in ("personal", "global", "local", "base")
        nll = entry["scores"]["validation"]
        ends = sorted((nll["global"], nll["local"]))
        assert ends[0] - 1e-3 < nll["personal"] < ends[1] + 1e-3, client


def test_its_code_keeps_to_the_house_rules(extended: Path) -> None:
    """As far as a formatter and a linter can tell."""
    ruff = shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not on the path")
    shutil.copy(ROOT / "pyproject.toml", extended)
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [ruff, *check, "--no-cache", "."], cwd=extended, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

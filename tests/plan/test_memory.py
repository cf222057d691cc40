"""The estimate of memory against what real runs have held; `pytest -m slow -s` shows the figures.

Two clients of the quickstart, one round of one step, each plan and each run in a process of its
own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_jsonl

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
ROWS = ROOT / "recipes" / "wiki-tiny" / "wiki_tiny.jsonl"
CLIENTS = ("en:Arts", "en:Mathematics")
TRAIN, TEST = 12, 8
"""Rows of each client, enough for a batch of eight of either kind."""

TOLERANCE = 0.25
RECIPES = {
    "the quickstart": [],
    "all 30 layers": ["adapter.layers_to_transform=null"],
    "float32, 8 rows of 256 tokens": [
        "backbone.dtype=float32",
        "training.per_device_train_batch_size=8",
        "data.max_length=256",
    ],
    "10 rows of 256 tokens": [
        "training.per_device_train_batch_size=10",
        "data.max_length=256",
    ],
    "float32, all layers, 2 rows of 512 tokens": [
        "backbone.dtype=float32",
        "adapter.layers_to_transform=null",
        "training.per_device_train_batch_size=2",
        "training.per_device_eval_batch_size=2",
        "data.max_length=512",
    ],
}


def few_rows(folder: Path) -> Path:
    """Write rows of two clients, each answer three times over, so that they fill `max_length`."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    chosen = []
    for client in CLIENTS:
        for split, n in (("train", TRAIN), ("test", TEST)):
            mine = [row for row in rows if (row["client"], row["split"]) == (client, split)]
            chosen += [row | {"response": 3 * (row["response"] + " ")} for row in mine[:n]]
    return write_jsonl(folder / "rows.jsonl", chosen)


def bytes_of(what: str, *overrides: str) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "tests.plan.peaks", what, str(QUICKSTART), *overrides],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak is read from /proc")
@pytest.mark.parametrize("name", RECIPES)
def test_the_estimate_is_near_what_a_run_holds(tmp_path: Path, name: str) -> None:
    changes = [
        *RECIPES[name],
        f"data.path={few_rows(tmp_path)}",
        f"runtime.output_dir={tmp_path}",
        "runtime.threads=1",
        "federation.rounds=1",
        "training.max_steps=1",
    ]
    estimate, measured = bytes_of("plan", *changes), bytes_of("run", *changes)
    off = estimate / measured - 1
    print(f"\n{name}: estimate {estimate / 1e9:.2f} GB, peak {measured / 1e9:.2f} GB, {off:+.0%}")
    assert abs(off) <= TOLERANCE

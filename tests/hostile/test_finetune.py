"""Whole runs with the ids, names and rows of strangers: nothing leaves the run folder."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from tests.hostile.hostile import NAMES
from tests.hostile.test_records import unfit
from tests.hostile.watched import Watched
from tests.tiny import client_rows, tiny_recipe, write_jsonl

FINE = [name for name in NAMES if not unfit(name)]
TEXTS = ["<|im_end|>", "</s>", "{{ messages }}", "{% raw %}", "\0", "\x1b[2J", "\u202e", "🦊" * 50]


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Import what a run imports: other libraries make caches of their own when they are."""
    import pfl_lm.cli.finetune
    import pfl_lm.finetune  # noqa: F401


@pytest.mark.parametrize("seed", range(6))
def test_a_run_keeps_to_its_folder(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "a" / "work"
    (work / "home").mkdir(parents=True)
    (work / "runs").mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work / "home"))
    chance = Random(seed)
    clients = chance.sample(FINE, 4)
    rows = client_rows(clients, n_rows=4)
    for row in rows:
        row["prompt"] = chance.choice(TEXTS) + row["prompt"][-40:]
        row["completion"] = row["completion"][-40:] + chance.choice(TEXTS)
    data = write_jsonl(work / "rows.jsonl", rows)
    changes = {
        "data.path": str(data),
        "federation.rounds": 1,
        "training.max_steps": 1,
        "data.max_length": 512,
    }
    recipe = tiny_recipe(work, **changes, **{"runtime.output_dir": str(work / "runs")})
    folder = work / "runs" / "tiny"
    watched = Watched(tmp_path, writable=(work / "runs",))

    code, _, stderr = watched.run("finetune", str(recipe))

    assert (code, stderr) == (0, "")
    index = json.loads((folder / "adapters.json").read_text())
    assert index["clients"].keys() == set(clients)
    slugs = {entry["slug"] for entry in index["clients"].values()}
    assert {path.name for path in (folder / "adapters").iterdir()} == slugs
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        assert {client for (client,) in ledger.execute("SELECT client FROM clients")} == {*clients}
    watched.writable = ()
    assert watched.run("push", str(folder), "--repo", "some-org/x", "--dry-run")[0] == 0

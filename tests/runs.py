"""Whole runs on the tiny backbone: how the tests start them and what they ask of them."""

from __future__ import annotations

import csv
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pfl_lm.errors import PflError
from pfl_lm.federation.watch import Watch
from pfl_lm.finetune import RunResult, finetune
from pfl_lm.recipe import load_recipe
from tests.tiny import tiny_recipe, write_jsonl

ROOT = Path(__file__).parents[1]
CLIENTS = ("alice", "bob", "carol")


def run(folder: Path, watch: Watch | None = None, **changes: Any) -> RunResult:
    """Run a tiny recipe that is written, with its data, to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    return finetune(load_recipe(tiny_recipe(folder, **changes)), watch)


def refused(folder: Path, kind: type[PflError], **changes: Any) -> PflError:
    with pytest.raises(kind) as caught:
        run(folder, **changes)
    return caught.value


def with_rows(folder: Path, rows: list[dict[str, str]]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return {"data.path": str(write_jsonl(folder / "rows.jsonl", rows))}


def ask(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        return ledger.execute(query).fetchall()


def scored(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pfl_lm_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pfl_lm", *arguments]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"} | more

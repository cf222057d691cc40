"""Runs that have noted diagnostics, and how they are asked for."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pfl_lm.cli.app import app

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

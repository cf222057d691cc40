"""Runs that end at any commit that a test chooses, and how to go on with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pfl_lm.federation.opening
import pfl_lm.federation.store
from pfl_lm.cli.app import app
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.lock import run_lock
from pfl_lm.finetune import finetune
from pfl_lm.recipe import load_recipe
from pfl_lm.resume import has_begun, run_recipe
from tests.tiny import tiny_recipe


@contextmanager
def held_by_another(folder: Path) -> Iterator[int]:
    """Let another process hold a run folder's lock while the body runs; yield its id."""
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with run_lock(folder):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        yield child
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)


class Killed(BaseException):
    """What a process that ends sees of it, in a test."""


@contextmanager
def killed_at(k: int) -> Iterator[list[int]]:
    """End the body at the ``k``-th commit or file, before it is made; count them."""
    seen = [0]

    def counted(call: Any) -> Any:
        def counting(*given: Any, **named: Any) -> Any:
            seen[0] += 1
            if seen[0] >= k:
                raise Killed
            return call(*given, **named)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "_commit", counted(Ledger._commit))
        for module in (pfl_lm.federation.store, pfl_lm.federation.opening):
            patch.setattr(module, "write_atomically", counted(module.write_atomically))
        yield seen


def stopped(folder: Path, k: int, **changes: Any) -> Path:
    """Start a run, end it at the ``k``-th commit, and return its folder."""
    folder.mkdir(exist_ok=True)
    loaded = load_recipe(tiny_recipe(folder, **changes))
    with killed_at(k), pytest.raises(Killed):
        finetune(loaded)
    return loaded.run_folder


def go_on(folder: Path, rounds: int | None = None) -> Path:
    """Go on with a run, or begin it if it has not begun."""
    if not has_begun(folder):
        return finetune(load_recipe(folder.parents[1] / "recipe.yaml")).folder
    return finetune(run_recipe(folder, rounds), resume=True).folder


def whole(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return finetune(load_recipe(tiny_recipe(folder, **changes))).folder


def cli(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*arguments])
    return result.exit_code, result.stdout, result.stderr

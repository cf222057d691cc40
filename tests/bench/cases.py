"""Cases to measure, on the tests' tiny backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pfl_lm.bench.case import Case, Did, load_case
from pfl_lm.bench.clock import Stopwatch
from pfl_lm.bench.ways import AGAINST, Way, asked_ways
from pfl_lm.preflight import check_recipe
from tests.tiny import tiny_recipe

TOP = {"adapter.layers_to_transform": [1]}


def tiny_case(
    folder: Path, overrides: Sequence[str] = (), *, steps: int | None = None, **changes: Any
) -> Case:
    """Return one client's turn by a tiny recipe that is written, with its data, to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    checked = check_recipe(tiny_recipe(folder, **changes), overrides, to_run=False)
    cpu = torch.device("cpu")
    return load_case(checked.loaded, checked.clients, cpu, folder, steps=steps)


def ways(case: Case, against: Sequence[str] = AGAINST) -> dict[str, Way]:
    return {way.name: way for way in asked_ways(case, against)}


def taken(case: Case, way: Way, stopwatch: Stopwatch | None = None) -> Did:
    with way.open(case, stopwatch or Stopwatch()) as turn:
        return turn()

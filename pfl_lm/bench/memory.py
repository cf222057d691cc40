"""The most memory each way holds, each in a process of its own, so that none hides another's."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

_TURNS = 2
"""How many turns a process takes: the second meets rows it has met before."""


def peaks(
    recipe: Path,
    overrides: Sequence[str],
    ways: Mapping[str, bool],
    disk: Path,
    *,
    against: Sequence[str],
    steps: int,
    threads: int,
    did: Callable[[str], None] = lambda way: None,
) -> dict[str, int | None]:
    """Return the peak of each way in bytes, from after the backbone was loaded.

    Args:
        recipe: the recipe's file.
        overrides: as `load_recipe` takes them.
        ways: by name, whether the way works on the resident backbone; what brings its own is not
            measured, since the process would hold both.
        disk: where turns write.
        against: as `asked_ways` takes it.
        steps: optimizer steps of a turn.
        threads: of each process.
        did: told of every way that is over.

    Returns:
        None for what was not measured, or whose process was ended, as for want of memory.
    """
    found = dict[str, int | None]()
    for name, resident in ways.items():
        found[name] = None
        if resident:
            found[name] = _apart(recipe, list(overrides), name, disk, list(against), steps, threads)
        did(name)
    return found


def _apart(*given: Any) -> int | None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as one:
        try:
            return one.submit(_peak, *given).result()
        except BrokenProcessPool:
            return None


def _peak(
    recipe: Path,
    overrides: list[str],
    name: str,
    disk: Path,
    against: list[str],
    steps: int,
    threads: int,
) -> int:
    """Load everything in this process, take the turns, and return what they held at most."""
    import torch
    from accelerate import Accelerator

    from pfl_lm.bench.case import load_case
    from pfl_lm.bench.clock import Stopwatch
    from pfl_lm.bench.machine import forget_peak, peak_bytes
    from pfl_lm.bench.ways import asked_ways
    from pfl_lm.preflight import check_recipe

    torch.set_num_threads(threads)
    checked = check_recipe(recipe, overrides, to_run=False)
    device = Accelerator().device
    case = load_case(checked.loaded, checked.clients, device, disk, steps=steps)
    [way] = [way for way in asked_ways(case, against) if way.name == name]
    forget_peak(device)
    for _ in range(_TURNS):
        with way.open(case, Stopwatch(device)) as turn:
            turn()
    return peak_bytes(device)

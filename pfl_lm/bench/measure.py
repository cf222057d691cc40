"""Every way in turn, again and again, on the same rows of one client."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pfl_lm.bench.case import Case
from pfl_lm.bench.clock import Stopwatch, now
from pfl_lm.bench.flops import Matrices, Shape
from pfl_lm.bench.machine import Multiplication, device_name, machine
from pfl_lm.bench.results import Bench, Result
from pfl_lm.bench.ways import FIT, SAME_LOOP, Way
from pfl_lm.layout import Vector


def measure(
    case: Case,
    ways: Sequence[Way],
    *,
    repeats: int,
    did: Callable[[Way], None] = lambda way: None,
) -> Bench:
    """Take the turn each way, ``repeats`` times and once before that does not count.

    Putting adapters in and taking them out is not timed, nor is what a way prepares; the ways
    share the one resident backbone. ``did`` is told of every turn.

    Raises:
        PflError: a turn has failed.
    """
    results = {way.name: Result(_flops(case, way)) for way in ways}
    product = Multiplication(case.backbone.dtype, case.device)
    rates: dict[str, list[float]] = {"wall": [], "cpu": []}
    ends: dict[str, Vector | None] = {}
    steps = Stopwatch(case.device)
    for i in range(repeats + 1):
        for way in ways:
            ends[way.name] = _one(case, way, steps, results[way.name], counts=i > 0)
            did(way)
        wall, cpu, n = product.measured()
        rates["wall"].append(n / wall)
        rates["cpu"].append(n / cpu)
    by = clock_to_go_by(case.device)
    same = _same(ends, case, results)
    return Bench(
        by=by,
        rate=statistics.median(rates[by]),
        n_tokens=sum(int(batch["attention_mask"].sum()) for batch in case.batches()),
        same_bits=same,
        ways=results,
        about=_about(case, repeats, product),
    )


def clock_to_go_by(device: torch.device) -> str:
    """Return which clock compares work: the processor's if one thread of a CPU does all of it.

    Others' work on the machine leaves that one alone. Several threads wait for each other while
    the processor's clock runs, and a GPU does not run it at all.
    """
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def _one(case: Case, way: Way, steps: Stopwatch, result: Result, *, counts: bool) -> Vector | None:
    """Take one turn, note its times if it counts, and return where it ended."""
    with way.open(case, steps) as turn:
        gc.collect()  # what the last way has left is not this one's
        steps.reset()
        wall, cpu = now(case.device)
        done = turn()
        wall_after, cpu_after = now(case.device)
    wall, cpu = wall_after - wall, cpu_after - cpu
    if counts:
        result.turn.add(wall, cpu)
        result.step.add(steps.wall / steps.laps, steps.cpu / steps.laps)
        result.fixed.add(wall - steps.wall, cpu - steps.cpu)
    result.n_steps = steps.laps
    result.up, result.down = done.up, done.down
    return done.end


def _flops(case: Case, way: Way) -> int:
    with case.adapter(all_layers=way.all_layers) as adapter:
        adapted = [entry.module for entry in adapter.layout.entries]
        matrices = Matrices.of(adapter.model, adapted)
    shapes = [Shape.of(batch, everywhere=way.everywhere) for batch in case.batches()]
    fit = sum(matrices.step(shape, trunk=way.trunk) for shape in shapes)
    return fit * (case.fits if way.whole else 1)


def _same(ends: dict[str, Vector | None], case: Case, results: dict[str, Result]) -> bool | None:
    """Note how far from the fit the other ways ended; return whether the same loop is at it."""
    fit, loop = ends.get(FIT), ends.get(SAME_LOOP)
    if fit is None or loop is None:
        return None
    with case.adapter() as adapter:
        way = float((fit - adapter.read()).norm())
    for name, end in ends.items():
        if end is not None and end.shape == fit.shape:
            results[name].apart = float((end - fit).norm()) / way
    return torch.equal(fit, loop)


def _about(case: Case, repeats: int, product: Multiplication) -> dict[str, Any]:
    recipe = case.recipe
    return {
        "recipe": recipe.name,
        "method": recipe.method.name,
        "backbone": case.backbone.name,
        "dtype": str(case.backbone.dtype).removeprefix("torch."),
        "device": device_name(case.device),
        "client": case.client,
        "rows": sum(len(batch["input_ids"]) for batch in case.batches()),
        "supervised": sum(len(batch["positions"]) for batch in case.batches()),
        "layers": recipe.adapter.layers_to_transform,
        "steps": case.steps,
        "rows_in_step": recipe.training.rows_in_step,
        "repeats": repeats,
        "matmul_side": product.side,
        "machine": machine(),
    }

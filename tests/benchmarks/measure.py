"""Taking times side by side, and printing them with the machine they were taken on."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

WALL, CPU = "wall", "cpu"


@dataclass
class Times:
    """Milliseconds of one thing that was done several times, by the wall and by the processor.

    On a machine that others use too, only the processor's time says what the work costs; what a
    disk takes is seen by the wall alone.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, wall: float, cpu: float) -> None:
        """Take in one measurement, in seconds."""
        self.wall.append(1e3 * wall)
        self.cpu.append(1e3 * cpu)

    @property
    def numbers(self) -> dict[str, float]:
        """Medians and the least, in milliseconds."""
        return {
            "wall_median": statistics.median(self.wall),
            "wall_least": min(self.wall),
            "cpu_median": statistics.median(self.cpu),
            "cpu_least": min(self.cpu),
            "times": len(self.wall),
        }


def now() -> tuple[float, float]:
    """Return seconds by the wall and by this process's processors."""
    return time.perf_counter(), time.process_time()


def alternate(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Do every piece of work in turn, again and again; the first time of each does not count."""
    times = {name: Times() for name in work}
    for i in range(repeats + 1):
        for name, do in work.items():
            wall, cpu = now()
            do()
            wall_after, cpu_after = now()
            if i:
                times[name].add(wall_after - wall, cpu_after - cpu)
    return times


def arguments(about: str, *, repeats: int) -> argparse.Namespace:
    """Read a benchmark's command line."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--tiny", action="store_true", help="the tests' two-layer backbone")
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser.parse_args()


def machine() -> dict[str, str | int]:
    """Return what times depend on."""
    import torch

    packages = ("torch", "lightning", "peft", "transformers")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def show(title: str, rows: Sequence[Sequence[object]], numbers: Mapping[str, object]) -> None:
    """Print a table, its first row being the heading, and everything once more as JSON."""
    texts = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in r] for r in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    print(title)
    for first, *rest in texts:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([f"  {first:<{widths[0]}}", *cells]))
    print(json.dumps({"title": title, **numbers, "machine": machine()}, ensure_ascii=False))


def table(times: Mapping[str, Times]) -> list[list[object]]:
    """Return rows for `show`: what was done, and its milliseconds."""
    rows: list[list[object]] = [["ms", "cpu median", "cpu least", "wall median", "wall least", "n"]]
    for name, each in times.items():
        n = each.numbers
        columns = ("cpu_median", "cpu_least", "wall_median", "wall_least")
        rows.append([name, *(n[column] for column in columns), len(each.wall)])
    return rows


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")

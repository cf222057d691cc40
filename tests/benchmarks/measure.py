"""What the benchmarks share: their command line, and how they print what they found."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence

from pfl_lm.bench.clock import Times, alternate, now
from pfl_lm.bench.machine import machine

__all__ = ["Times", "alternate", "arguments", "machine", "now", "show", "table"]


def arguments(about: str, *, repeats: int) -> argparse.Namespace:
    """Read a benchmark's command line."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--tiny", action="store_true", help="the tests' two-layer backbone")
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser.parse_args()


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

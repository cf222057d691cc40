"""The tables and lines that ``pfl-lm bench`` ends with."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from pfl_lm.bench.clock import Times
from pfl_lm.bench.results import Bench
from pfl_lm.bench.ways import FIT, OURS, SAME_LOOP
from pfl_lm.cli.plan import size

CLOCKS = {"cpu": "the processor's clock", "wall": "the wall's clock"}


def tables(found: Bench) -> Iterator[Table]:
    """Yield how fast each way is, and then where its time and memory go."""
    first = _table("turn ms", "least–most", "cpu ms", "turns/h", "tokens/s", "ratio")
    second = _table("step ms", "fixed ms", "Gflop", "of matmul", "peak", "from fit")
    for name, result in found.ways.items():
        wall = result.turn.numbers
        first.add_row(
            name,
            _ms(wall["wall_median"]),
            f"{_ms(wall['wall_least'])}–{_ms(wall['wall_most'])}",
            _ms(wall["cpu_median"]),
            f"{found.turns_per_hour(name):,.0f}",
            f"{found.tokens_per_second(name):,.0f}",
            f"{found.ratio(name, OURS):.2f}",
        )
        second.add_row(
            name,
            _ms(_median(result.step, found.by)),
            _ms(_median(result.fixed, found.by)),
            f"{result.flops / 1e9:,.3g}",
            f"{100 * found.share(name):.1f} %",
            "-" if result.peak is None else size(result.peak),
            "-" if result.apart is None else f"{result.apart:.1g}",
        )
    yield first
    yield second


def lines(found: Bench) -> Iterator[str]:
    """Yield what the columns are, and what is said once."""
    about, machine = found.about, found.about["machine"]
    yield (
        f"Medians of {about['repeats']} turns each, in turn. ratio: to {OURS}'s time. It, step, "
        f"fixed and of matmul go by {CLOCKS[found.by]}, the rest by the wall's. fixed: a turn "
        "less its steps."
    )
    n = about["matmul_side"]
    yield (
        f"of matmul: of {found.rate / 1e9:,.3g} Gflop/s, a product of {about['dtype']} matrices of "
        f"{n} by {n} here. from fit: how far apart they end, as a share of the way."
    )
    if found.same_bits is not None:
        ratio = found.ratio(FIT, SAME_LOOP)
        same = "the same bits" if found.same_bits else "OTHER bits"
        yield (
            f"LocalTrainer.train takes {ratio:.3f} times as long as the loop with its loss, and "
            f"ends at {same}."
        )
    ours = found.ways[OURS]
    if ours.up is not None and ours.down is not None:
        yield f"A turn sends {size(ours.up)} and is sent {size(ours.down)}."
    yield (
        f"{about['rows']} rows, {found.n_tokens:,} tokens of which {about['supervised']:,} are "
        f"supervised. {machine['processor']}, {machine['cores']} cores, {machine['threads']} "
        f"thread{'s' * (machine['threads'] != 1)}, load {machine['load']}, torch "
        f"{machine['torch']}, {machine['date']}"
    )


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("way", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _median(times: Times, by: str) -> float:
    return times.numbers[f"{by}_median"]


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"

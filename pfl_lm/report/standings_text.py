"""The standings of a comparison in words and numbers, as tables and pages show them.

Losses are nats a supervised token, lower is better; differences below zero are in favour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pfl_lm.evaluate.fairness import Spread
from pfl_lm.evaluate.standings import Difference, Standing, Standings, over_seeds
from pfl_lm.evaluate.trials import Outcome, Rate

MINUS = "−"
NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column, and in a sentence what stands in it."""

    head: str
    meaning: str


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table whose cells are ready to be shown; the first column names the method."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def loss(value: float) -> str:
    """Return a loss with three digits after the point."""
    return NOTHING if math.isnan(value) else f"{value:.3f}"


def signed(value: float) -> str:
    """Return a difference with its sign."""
    if math.isnan(value):
        return NOTHING
    text = f"{value:+.3f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", MINUS)


def printable(text: str) -> str:
    """Write out what would not show, or would turn the text around it."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def with_spread(values: Sequence[float], show: Callable[[float], str] = loss) -> str:
    """Return a mean over seeds and, with more than one, their standard deviation."""
    mean, std = over_seeds(values)
    return show(mean) if math.isnan(std) else f"{show(mean)} ± {std:.3f}"


def rate_text(rate: Rate | None) -> str:
    """Return a learning rate as a person writes it."""
    return NOTHING if rate is None else rate if isinstance(rate, str) else f"{rate:g}"


def used_rate(row: Standing) -> str:
    """Return a method's learning rate, and what `auto` came to."""
    if row.rate != "auto" or not row.outcomes:
        return rate_text(row.rate)
    found = sorted({rate_text(outcome.learning_rate) for outcome in row.outcomes})
    return f"auto: {', '.join(found)}"


def interval_text(difference: Difference) -> str:
    """Return a difference and its interval."""
    found = difference.interval
    if math.isnan(found.low):
        return signed(found.estimate)
    return f"{signed(found.estimate)} ({signed(found.low)} to {signed(found.high)})"


def score_table(found: Standings) -> TextTable:
    """Return how each method does: on average, and for those who are worst off."""
    columns = (
        Column("method", "Its label; `base` is the untouched backbone."),
        Column("rate", "Learning rate, chosen on validation with the first seed."),
        Column(
            "mean",
            f"Mean over clients of their own models' {found.split} loss, over seeds; "
            "[2 of 3]: the other runs diverged or are missing.",
        ),
        Column("by rows", f"The same, each client weighted by its {found.split} rows."),
        Column("worst", "Loss of the client that is worst off."),
        Column("tenth", "The worst-off tenth of clients has at least this: 90th percentile."),
        Column("std", "Standard deviation over clients: how unequal they are."),
    )
    return TextTable(columns, tuple(_score_row(row) for row in _with_base(found)))


def _score_row(row: Standing) -> tuple[str, ...]:
    def over(pick: Callable[[Spread], float]) -> list[float]:
        return [pick(each) for each in row.spreads]

    return (
        row.label,
        used_rate(row),
        with_spread(over(lambda each: each.mean)) + _part(row),
        *(
            loss(over_seeds(over(pick))[0])
            for pick in (
                lambda each: each.weighted,
                lambda each: each.worst,
                lambda each: each.tail,
                lambda each: each.std,
            )
        ),
    )


def _part(row: Standing) -> str:
    """Say so if a row is not of all seeds."""
    n, of = int(row.finished.sum()), len(row.finished)
    return f" [{n} of {of}]" if 0 < n < of else ""


def client_table(found: Standings) -> TextTable:
    """Return what the choice of models made of each method, and how many clients it harmed."""
    columns = (
        Column("method", "Its label."),
        Column("validation", "Mean over clients of their own models' validation loss."),
        Column("unchosen", "Mean loss of the method's own candidate, before any choice."),
        Column("harmed", "Clients worse off than with the untouched backbone, mean over seeds."),
        Column("vs local", "Clients worse off than with local training alone, mean over seeds."),
    )
    n = len(found.clients)
    rows = (
        (
            row.label,
            loss(row.validation),
            with_spread([float(losses.mean()) for losses in row.own[row.finished]]),
            _harmed(row.harmed, n),
            "" if row.label == found.local else _harmed(row.harmed_by_local, n),
        )
        for row in found.methods
    )
    return TextTable(columns, tuple(rows))


def _with_base(found: Standings) -> list[Standing]:
    return [*([] if found.base is None else [found.base]), *found.methods]


def _harmed(harmed: Sequence[int], n: int) -> str:
    if not harmed:
        return NOTHING
    return f"{sum(harmed) / len(harmed):.1f}".removesuffix(".0") + f" of {n}"


def local_table(found: Standings) -> TextTable:
    """Return how each method stands to local training."""
    columns = (
        Column("method", "Its label."),
        Column("minus local", "Its loss minus that of local training, and the 95 % interval."),
        Column("so it is", "What that interval lets one say."),
    )
    rows = (
        (row.label, interval_text(row.against_local), row.against_local.verdict)
        if row.against_local is not None
        else (row.label, "", "local training itself" if row.label == found.local else NOTHING)
        for row in found.methods
    )
    return TextTable(columns, tuple(rows))


def best_table(found: Standings) -> TextTable:
    """Return how each method stands to the best of the others, best by validation."""
    columns = (
        Column("method", "Its label."),
        Column("other", "The best other method, by validation."),
        Column("minus other", "Its loss minus the other's, and the 95 % interval."),
        Column("so it is", "What that interval lets one say."),
    )
    rows = (
        (row.label, best.other, interval_text(best), best.verdict)
        for row in found.methods
        if (best := row.against_best) is not None
    )
    return TextTable(columns, tuple(rows))


def cost_table(found: Standings) -> TextTable:
    """Return what each method took, as it was measured."""
    columns = (
        Column("method", "Its label."),
        Column("optimizer", "What its clients train with."),
        Column("steps", "Optimizer steps as done, all rounds and clients; × the fewest of all."),
        Column("MB up", "Sent to the server, all rounds and clients."),
        Column("seconds", "Time of the clients' turns in all; scoring not counted."),
        Column("runs", "Seeds that came to an end, of those asked for, and what went wrong."),
    )
    fewest = min((o.steps for row in found.methods for o in row.outcomes), default=0)
    return TextTable(columns, tuple(_cost_row(row, found, fewest) for row in found.methods))


def _cost_row(row: Standing, found: Standings, fewest: int) -> tuple[str, ...]:
    def mean(pick: Callable[[Outcome], float]) -> float:
        return over_seeds([pick(each) for each in row.outcomes])[0]

    diverged = f", {row.failed} diverged" if row.failed else ""
    runs = f"{len(row.outcomes)} of {len(found.seeds)}{diverged}"
    if not row.outcomes:
        return (row.label, row.optimizer, NOTHING, NOTHING, NOTHING, runs)
    steps = mean(lambda each: each.steps)
    times = f"{steps / fewest:.2g}×" if fewest else ""
    faults = sum(each.faults for each in row.outcomes)
    return (
        row.label,
        row.optimizer,
        f"{steps:g}" + ("" if times in ("1×", "") else f" ({times})"),
        f"{mean(lambda each: each.bytes_up) / 1e6:.1f}",
        _seconds(mean(lambda each: each.seconds)),
        runs + (f", {faults} turns failed" if faults else ""),
    )


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def doubts(found: Standings) -> Iterator[str]:
    """Yield what speaks against taking the numbers at their word."""
    for grid in found.grids:
        if grid.remark:
            chosen = "" if grid.chosen is None else f"{rate_text(grid.chosen)} is "
            yield f"{grid.label}: {chosen}{grid.remark}"
    if len(found.seeds) == 1:
        yield "one seed: what another one would have given is not known"
    devices = {t.about.get("device") for row in found.methods for t in row.trials} - {None}
    if len(devices) > 1:
        yield f"runs on {', '.join(sorted(map(str, devices)))}: last digits differ between devices"
    if found.split == "validation":
        yield "no client has test rows: losses are of the rows that models and rates were chosen on"

"""``compare.html``: a comparison as one file that needs nothing else and fetches nothing.

Everything that is put into the page is escaped by the template, and what does not print is written
out, so a client's id acts on neither the page nor the text around it. A policy in the page itself
forbids scripts and every request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pfl_lm.evaluate.bootstrap import LEVEL, RESAMPLES
from pfl_lm.evaluate.rates import Grid, Tried
from pfl_lm.evaluate.standings import Array, Difference, Standing, Standings, by_client
from pfl_lm.evaluate.trials import Trial
from pfl_lm.report.standings_text import (
    NOTHING,
    TextTable,
    best_table,
    client_table,
    cost_table,
    doubts,
    interval_text,
    local_table,
    loss,
    printable,
    rate_text,
    score_table,
    signed,
)

MOST_CLIENTS = 500
"""How many clients are listed by name; the CSV file has all."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a page comes from.

    Attributes:
        recipe: what all trials share, as YAML without places and text about the data.
        command: what to type to make it again.
        written: the date, for people.
        missing: runs that are not there yet; and ``n_unnamed`` more that follow from them.
        strangers: runs in the folder that are of no method compared here.
    """

    name: str
    recipe: str
    command: str
    written: str
    missing: tuple[str, ...] = ()
    n_unnamed: int = 0
    strangers: tuple[str, ...] = ()


def comparison_page(found: Standings, trials: Sequence[Trial], origin: Provenance) -> str:
    """Return the page of a comparison, complete HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from pfl_lm.report import charts

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    some = any(row.outcomes for row in found.methods)
    return environment.get_template("page.html.j2").render(
        found=found,
        origin=origin,
        level=f"{100 * LEVEL:g} %",
        resamples=f"{RESAMPLES:,}",
        sentences=list(_sentences(found)),
        doubts=list(doubts(found)),
        scores=_joined(score_table(found), client_table(found)),
        differences=_joined(local_table(found), best_table(found)),
        costs=cost_table(found),
        curves=Markup(charts.curves(found)) if some else "",
        dots=Markup(charts.clients(found)) if some else "",
        wins=_wins(found) if some else None,
        grids=[_grid(grid) for grid in found.grids],
        clients=_clients(found) if some else None,
        more_clients=max(0, len(found.clients) - MOST_CLIENTS),
        diverged=[trial for trial in trials if trial.state == "failed"],
        versions=_versions(trials),
        digests=sorted({trial.digest for trial in trials if trial.digest}),
        n_trials=sum(trial.state == "finished" for trial in trials),
    )


def _sentences(found: Standings) -> Iterator[tuple[str, str]]:
    """Yield (label, what may be said of it), and no more than that: first of the best one."""
    best = found.methods[0] if found.methods else None
    if best is not None and best.against_best is not None:
        other = best.against_best
        words = "is the best by validation; it "
        yield best.label, words + _said(other, f"the best other, {other.other}")
    for row in found.methods:
        if row.against_local is not None:
            yield row.label, _said(row.against_local, "local training")


def _said(told: Difference, other: str) -> str:
    words = {
        "better": f"is better than {other} here",
        "worse": f"is worse than {other} here",
        "no difference shown": f"shows no difference to {other}",
    }
    verdict, _, one_seed = told.verdict.partition(" (one")
    if verdict not in words:
        return f"cannot be set against {other}: {told.verdict}"
    alone = ", with one seed" if one_seed else ""
    return f"{words[verdict]}{alone}: {interval_text(told)}"


def _joined(one: TextTable, other: TextTable) -> TextTable:
    """Return two tables side by side, by the first cell of their rows."""
    beside = {row[0]: row[1:] for row in other.rows}
    empty = ("",) * (len(other.columns) - 1)
    rows = tuple((*row, *beside.get(row[0], empty)) for row in one.rows)
    return TextTable((*one.columns, *other.columns[1:]), rows)


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a shaded table: its text, how strongly it is shaded, and in whose favour."""

    text: str
    shade: int = 0
    favour: str = ""
    title: str = ""


def _wins(found: Standings) -> list[tuple[str, list[Cell]]]:
    labels = [row.label for row in found.methods]
    return [
        (row, [_win(found.wins.get((row, column)), row, column) for column in labels])
        for row in labels
    ]


def _win(share: float | None, row: str, column: str) -> Cell:
    if share is None or math.isnan(share):
        return Cell(NOTHING)
    told = f"{row} beats {column} in {100 * share:.0f} % of the pairs"
    favour = "good" if share > 0.5 else "bad" if share < 0.5 else ""
    return Cell(f"{100 * share:.0f}", round(abs(share - 0.5) * 90), favour, told)


def _grid(grid: Grid) -> tuple[str, list[tuple[Tried, str]], str]:
    tried = [(each, _tried(each)) for each in grid.tried]
    return (
        grid.label,
        [(each, f"{rate_text(each.rate)}: {text}") for each, text in tried],
        (grid.remark),
    )


def _tried(each: Tried) -> str:
    words = {"failed": "diverged", "missing": "not run", "begun": "not finished"}
    return words[each.state] if each.validation is None else loss(each.validation)


def _clients(found: Standings) -> list[tuple[str, list[Cell]]]:
    """Return each client's loss with each model, shaded by its difference to local training."""
    assert found.base is not None
    local = next((row for row in found.methods if row.label == found.local), None)
    columns = [found.base, *found.methods]
    means = [_mean(row) for row in columns]
    differences = [
        None if local is None or row is local else by_client(row, local) for row in columns
    ]
    most = max((float(np.abs(each).max()) for each in differences if each is not None), default=0)
    shown = []
    for i, client in enumerate(found.clients[:MOST_CLIENTS]):
        cells = []
        for mean, difference in zip(means, differences, strict=True):
            gap = math.nan if difference is None else float(difference[i])
            shade = round(45 * abs(gap) / most) if most and not math.isnan(gap) else 0
            favour = "good" if gap < 0 else "bad" if gap > 0 else ""
            title = f"{signed(gap)} against local training" if favour else ""
            cells.append(Cell(loss(float(mean[i])), shade, favour, title))
        shown.append((client, cells))
    return shown


def _mean(row: Standing) -> Array:
    if not row.finished.any():
        return np.full(row.losses.shape[1], np.nan)
    mean: Array = row.losses[row.finished].mean(axis=0)
    return mean


def _versions(trials: Sequence[Trial]) -> list[tuple[str, str]]:
    """Return what the trials were run with: each fact, and every value it has."""
    found: dict[str, dict[str, int]] = {}
    for trial in trials:
        for key, value in trial.about.items():
            counts = found.setdefault(key, {})
            counts[value] = counts.get(value, 0) + 1
    return [(key, _counted(counts)) for key, counts in found.items()]


def _counted(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({n} runs)" for value, n in sorted(counts.items()))

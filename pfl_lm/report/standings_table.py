"""The standings of a comparison on a terminal."""

from __future__ import annotations

from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pfl_lm.evaluate.standings import Standings
from pfl_lm.report.standings_text import (
    TextTable,
    best_table,
    client_table,
    cost_table,
    doubts,
    local_table,
    score_table,
)

_TEXTS = ("method", "other", "so it is", "optimizer", "runs")
"""Heads of columns that hold words, not numbers."""


def standings_tables(found: Standings) -> Group:
    """Lay out scores, differences and costs, and what is in doubt."""
    seeds = "1 seed" if len(found.seeds) == 1 else f"{len(found.seeds)} seeds"
    parts: list[RenderableType] = []

    def add(title: str, table: TextTable) -> None:
        if table.rows:
            parts.extend((Text(title), _table(table)))

    add(
        f"{found.split} loss of the clients' own models, nats a supervised token: lower is "
        f"better; {len(found.clients)} clients, {seeds}, ± standard deviation over seeds",
        score_table(found),
    )
    add("who was harmed, and what choosing models on validation did", client_table(found))
    intervals = "95 % bootstrap interval over clients and seeds, each by itself"
    add(f"against local training; {intervals}", local_table(found))
    add(f"against the best other method by validation; {intervals}", best_table(found))
    add("what a run took", cost_table(found))
    parts += [Text(f"! {doubt}") for doubt in doubts(found)]
    return Group(*parts)


def _table(shown: TextTable) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in shown.columns:
        text = column.head in _TEXTS
        justify: Literal["left", "right"] = "left" if text else "right"
        table.add_column(column.head, justify=justify, no_wrap=not text, overflow="fold")
    for row in shown.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table

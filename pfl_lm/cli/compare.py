"""``pfl-lm compare``: several methods on the same clients, and what can be said of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from pfl_lm.cli.exits import plain
from pfl_lm.cli.interrupts import Interrupted, Interrupts
from pfl_lm.cli.run import run_console
from pfl_lm.compare.plan import Asked, Plan, make_plan

if TYPE_CHECKING:
    from pfl_lm.compare.reading import Found


def compare(
    recipe: Path, overrides: Sequence[str], asked: Asked, *, report_only: bool = False
) -> None:
    """Run every cell that is not over, then write and show what all of them say.

    Raises:
        PflError: the recipe or what it compares cannot be used, or a cell cannot be run.
        Interrupted: it was stopped by SIGINT or SIGTERM.
    """
    console = run_console()
    plan = make_plan(recipe, overrides, asked)
    command = shlex.join(["pfl-lm", "compare", str(recipe), *overrides, *asked.words()])
    for line in _about(plan):
        _say(console, line)
    if report_only:
        from pfl_lm.compare.reading import read_cells

        found = read_cells(plan)
    else:
        found = _run(plan, command, console)
    _report(plan, found, command, console)


def _about(plan: Plan) -> list[str]:
    """Return what is compared, a line a method."""
    recipe = plan.loaded.recipe
    seeds = ", ".join(map(str, plan.seeds))
    lines = [
        f"{recipe.name}: {len(plan.contenders)} methods, {len(plan.clients)} clients, "
        f"{recipe.federation.rounds} rounds of {recipe.training.length}, "
        f"{'seed' if len(plan.seeds) == 1 else 'seeds'} {seeds}; "
        f"into {plan.folder}"
    ]
    width = max(len(contender.label) for contender in plan.contenders)
    for contender in plan.contenders:
        options = contender.loaded.recipe
        rates = ", ".join(f"{rate:g}" if rate != "auto" else "auto" for rate in contender.rates)
        added = "; comes with every comparison" if contender.added else ""
        lines.append(
            f"  {contender.label:<{width}}  {options.method.name}, "
            f"{options.training.optimizer}, rates {rates}{added}"
        )
    return lines


def _run(plan: Plan, command: str, console: Console) -> Found:
    interrupts = Interrupts(lambda text: console.print(Text(text)))
    try:
        with interrupts:
            from pfl_lm.cli.cells_display import CellsDisplay
            from pfl_lm.compare.running import run_cells

            with CellsDisplay(console, plan, interrupts) as display:
                return run_cells(plan, display)
    except Interrupted:
        _say(console, f"stopped; what is done is kept. To go on: {command}")
        raise


def _report(plan: Plan, found: Found, command: str, console: Console) -> None:
    """Write the page and the table of all scores, and show the tables, if there is anything."""
    from pfl_lm.compare.writing import write_report
    from pfl_lm.report.standings_table import standings_tables

    files: list[Path] = []
    if any(trial.state != "missing" for trial in found.trials):
        standings, files = write_report(plan, found, command)
        console.print()
        console.print(standings_tables(standings), soft_wrap=False)
    for line in _left(plan, found, command):
        _say(console, line)
    for file in files:
        _say(console, str(file))


def _left(plan: Plan, found: Found, command: str) -> list[str]:
    lines = []
    if found.n_left:
        total = found.n_over + found.n_left
        names = ", ".join(found.missing[:5]) + (", …" if len(found.missing) > 5 else "")
        lines.append(f"{found.n_left} of {total} runs are missing: {names}")
        lines.append(f"to run them: {command}")
    if found.strangers:
        names = ", ".join(found.strangers[:5]) + (", …" if len(found.strangers) > 5 else "")
        lines.append(f"not of this comparison, and not used: {names}")
    return lines


def _say(console: Console, text: str) -> None:
    console.print(Text(plain(text)))

"""What a comparison leaves in its folder: ``compare.html`` and ``compare.csv``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pfl_lm.compare.plan import Plan
from pfl_lm.compare.reading import Found
from pfl_lm.evaluate.standings import Standings, standings
from pfl_lm.export.card_recipe import shown_recipe
from pfl_lm.files import write_atomically
from pfl_lm.report.page import Provenance, comparison_page
from pfl_lm.report.standings_csv import standings_csv

PAGE, TABLE = "compare.html", "compare.csv"


def write_report(plan: Plan, found: Found, command: str) -> tuple[Standings, list[Path]]:
    """Write the page and the table of what is there; return the standings and the files.

    Raises:
        RunFolderError: they cannot be written.
    """
    made = standings(found.trials, plan.seeds)
    origin = Provenance(
        name=plan.folder.name,
        recipe=shown_recipe(plan.loaded.recipe, plan.clients.keys()),
        command=command,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        missing=found.missing,
        n_unnamed=found.n_unnamed,
        strangers=found.strangers,
    )
    files = [plan.folder / PAGE, plan.folder / TABLE]
    write_atomically(files[0], comparison_page(made, found.trials, origin).encode())
    write_atomically(files[1], standings_csv(found.trials, made.grids).encode())
    return made, files

"""``pfl-lm finetune``: from a recipe to one exported adapter per client."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pfl_lm.cli.interrupts import Interrupted, interruptible
from pfl_lm.preflight import check_recipe


def finetune(recipe: Path, overrides: list[str]) -> None:
    """Run a recipe, show how it goes, and end with the table of clients and what to type next.

    Raises:
        PflError: the recipe or what it names cannot be used.
        Interrupted: the run was stopped by SIGINT or SIGTERM.
    """
    speaks = os.environ.get("RANK", "0") == "0"
    console = Console(highlight=False, soft_wrap=True, quiet=not speaks)
    checked = check_recipe(recipe, overrides)  # all that is quick, before the slow imports
    options, folder = checked.loaded.recipe, checked.loaded.run_folder
    console.print(Text(f"{options.name}: {options.method.name}, into {folder}"))

    try:
        with interruptible():
            from pfl_lm.cli.display import Display
            from pfl_lm.finetune import finetune as run
            from pfl_lm.report.table import client_table, summary_lines

            with Display(console, options.training.rows_in_step) as display:
                result = run(checked.loaded, display, checked.clients)
    except Interrupted:
        if folder.exists():
            console.print(Text(f"stopped; {folder} holds the rounds that were finished"))
        raise

    if not speaks:
        return
    console.print()
    console.print(client_table(result.clients))
    for line in summary_lines(result.clients, result.folder):
        console.print(Text(line))

"""``pfl-lm finetune``: from a recipe to one exported adapter per client."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pfl_lm.cli.exits import label, plain
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

    def say(text: str) -> None:
        console.print(Text(plain(text)))

    say(f"{options.name}: {options.method.name}, into {folder}")

    try:
        with interruptible():
            from pfl_lm.cli.display import Display
            from pfl_lm.finetune import finetune as run
            from pfl_lm.report.table import client_table, summary_lines

            with Display(console, options.training.rows_in_step) as display:
                result = run(checked.loaded, display, checked.clients)
    except Interrupted:
        if folder.exists():
            say(f"stopped; {folder} holds the rounds that were finished")
        raise

    if not speaks:
        return
    console.print()
    shown = [replace(each, client=label(each.client)) for each in result.clients]
    console.print(client_table(shown))
    for line in summary_lines(shown, result.folder):
        say(line)

"""``pfl-lm resume``: go on with a run, wherever it was left; or give a finished one more rounds."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.text import Text

from pfl_lm.cli.exits import plain
from pfl_lm.cli.run import run_console, show_run
from pfl_lm.preflight import preflight_resume
from pfl_lm.recipe import LoadedRecipe
from pfl_lm.resume import finished_rounds, run_recipe, with_rounds


def resume(run: Path, rounds: int | None) -> None:
    """Go on with the run in a folder, up to ``rounds`` rounds in all if a number is given.

    Raises:
        PflError: there is no run, or something it needs is gone or has changed.
        Interrupted: the run was stopped by SIGINT or SIGTERM.
    """
    go_on(run_recipe(run, rounds))


def go_on(loaded: LoadedRecipe) -> None:
    """Go on with a run by its recipe, or say that it is finished."""
    folder, rounds = loaded.run_folder, loaded.recipe.federation.rounds
    if finished_rounds(folder) == rounds:
        more = shlex.join(["pfl-lm", "resume", str(folder), "--rounds", str(2 * rounds)])
        console = run_console()
        console.print(Text(plain(f"{folder}: finished, all {rounds} rounds")))
        console.print(Text(plain(f"next: for more of them  {more}")))
        return
    loaded = with_rounds(loaded, None)
    show_run(loaded, preflight_resume(loaded), resume=True)

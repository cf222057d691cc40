"""``pfl-lm finetune``: from a recipe to one exported adapter per client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pfl_lm.cli.resume import go_on
from pfl_lm.cli.run import show_run
from pfl_lm.preflight import check_recipe
from pfl_lm.resume import has_begun, refuse_differences, run_recipe


def finetune(recipe: Path, overrides: list[str], *, resume: bool = False) -> None:
    """Run a recipe; with ``resume``, go on with its run if there is one.

    Raises:
        PflError: the recipe or what it names cannot be used, or is not what the run began with.
        Interrupted: the run was stopped by SIGINT or SIGTERM.
    """
    # All that is quick comes first, before the slow imports.
    checked = check_recipe(recipe, overrides, to_run=not resume)
    folder = checked.loaded.run_folder
    if resume and has_begun(folder):
        refuse_differences(run_recipe(folder).recipe, checked.loaded)
        go_on(replace(checked.loaded, folder=folder))
        return
    if resume:
        checked = check_recipe(recipe, overrides)
    show_run(checked.loaded, checked.clients, checked.notes)

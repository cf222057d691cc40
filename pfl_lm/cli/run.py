"""A run on the screen: how it goes, how it ended, and what to type next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from pfl_lm.cli.exits import label, plain
from pfl_lm.cli.interrupts import Interrupted, Interrupts
from pfl_lm.errors import LostRankError
from pfl_lm.resume import has_begun

if TYPE_CHECKING:
    from pfl_lm.data.splits import ClientRows
    from pfl_lm.recipe import LoadedRecipe


def show_run(
    loaded: LoadedRecipe,
    clients: Mapping[str, ClientRows],
    notes: Sequence[str] = (),
    *,
    resume: bool = False,
) -> None:
    """Run a recipe that was checked, and end with the table of clients; ``notes`` come first.

    Raises:
        PflError: the recipe or what it names cannot be used after all.
        Interrupted: the run was stopped by SIGINT or SIGTERM.
    """
    console = run_console()
    options, folder = loaded.recipe, loaded.run_folder

    def say(text: str) -> None:
        console.print(Text(plain(text)))

    how = "going on in" if resume else "into"
    say(f"{options.name}: {options.method.name}, {how} {folder}")
    for note in notes:
        say(note)
    interrupts = Interrupts(say)
    try:
        with interrupts, _not_alone(interrupts):
            from pfl_lm.cli.display import Display
            from pfl_lm.finetune import finetune
            from pfl_lm.report.table import client_table, summary_lines

            with Display(console, options.training.rows_in_step, interrupts) as display:
                result = finetune(loaded, display, clients, resume=resume)
    except Interrupted:
        if has_begun(folder):
            say(f"stopped; to go on: {resume_command(folder)}")
        raise
    if console.quiet:
        return
    console.print()
    shown = [replace(each, client=label(each.client)) for each in result.clients]
    console.print(client_table(shown))
    for line in summary_lines(shown, result.folder):
        say(line)


@contextmanager
def _not_alone(interrupts: Interrupts) -> Iterator[None]:
    """Take the loss of another rank for what it is when both were asked to stop."""
    try:
        yield
    except LostRankError:
        interrupts.check()
        raise


def run_console() -> Console:
    """Return the console of this rank: the first one's speaks, the others' are quiet."""
    return Console(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")


def resume_command(folder: Path) -> str:
    """Return what to type to go on with a run."""
    return shlex.join(["pfl-lm", "resume", str(folder)])

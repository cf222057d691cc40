"""``pfl-lm diagnose``: what a run's turns have told of themselves, and PAC-Bayes style figures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pfl_lm.cli.exits import label, plain
from pfl_lm.cli.run import resume_command, run_console
from pfl_lm.errors import PflError
from pfl_lm.federation.lock import run_lock
from pfl_lm.recipe import LoadedRecipe
from pfl_lm.resume import finished_rounds, glance, run_recipe

if TYPE_CHECKING:
    from pfl_lm.diagnose import ClientFigure
    from pfl_lm.report.diagnostics import Told

CAVEAT = """\
This is a diagnostic of this run and NOT the bound of the pFLAlign paper. With probability {sure:g}
a client's figure, taken by itself, is at least the error expected of its noisy adapter on new rows;
that is, if its train rows are independent draws from one source, of which the backbone's own
training and the seed know nothing."""

WIDE = 160
"""Columns of a table that no terminal cuts short."""


def diagnose(run: Path, round: int | None, *, samples: int, bound: bool) -> None:
    """Show a run's diagnostics and write them to ``diagnostics.csv``; then the figures.

    Raises:
        PflError: there is no run, another process is at work in it, or it is not what it says.
    """
    console = run_console()
    if not console.is_terminal:
        console.width = WIDE
    loaded = run_recipe(run)
    folder = loaded.run_folder
    from pfl_lm.federation.opening import refuse_links

    refuse_links(folder)
    with run_lock(folder):
        _show_turns(console, loaded, round)
        if bound:
            _show_figures(console, loaded, samples)


def _show_turns(console: Console, loaded: LoadedRecipe, round: int | None) -> None:
    from pfl_lm.report.diagnostics import diagnosed, refresh_diagnostics, write_diagnostics
    from pfl_lm.report.diagnostics_table import layer_table, round_table

    folder = loaded.run_folder
    with glance(folder) as ledger:
        found = diagnosed(ledger) if ledger is not None else []
        if ledger is not None and not found:
            refresh_diagnostics(folder, ledger)
    if not found:
        _say(console, f"{folder}: no turn of this run has noted diagnostics")
        _say(console, f"next: {_how_to_note(loaded)}\n")
        return
    shown = _round(found, round)
    path = write_diagnostics(folder, found)
    console.print(round_table(found))
    console.print(layer_table(found, shown))
    _say(console, f"{path}  every round, client and layer\n")


def _round(found: Sequence[Told], wanted: int | None) -> int:
    rounds = sorted({each.round for each in found})
    if wanted is not None and wanted not in rounds:
        raise PflError(
            f"--round: no turn of round {wanted} has noted diagnostics",
            hint=f"those that have are of {len(rounds)} rounds, {rounds[0]} to {rounds[-1]}",
        )
    return rounds[-1] if wanted is None else wanted


def _how_to_note(loaded: LoadedRecipe) -> str:
    recipe = loaded.recipe
    if recipe.privacy.record_level is not None:
        return "none can be: `privacy.record_level` does not account for what they would tell"
    words = [str(loaded.run_folder / "recipe.resolved.yaml"), f"name={recipe.name[:70]}-diagnosed"]
    again = shlex.join(["pfl-lm", "finetune", *words, "runtime.diagnostics=true"])
    return f"they are noted by a run of its own, with the same results:  {again}"


def _show_figures(console: Console, loaded: LoadedRecipe, samples: int) -> None:
    folder = loaded.run_folder
    if loaded.recipe.privacy.record_level is not None:
        _say(console, "no PAC-Bayes style figures: they read the train rows without noise, which")
        _say(console, "`privacy.record_level` does not account for")
        return
    if finished_rounds(folder) is None:
        _say(console, "PAC-Bayes style figures are for a finished run; this one has more to do")
        _say(console, f"next: {resume_command(folder)}")
        return
    from pfl_lm.diagnose import client_figures
    from pfl_lm.evaluate.pac_bayes import DELTA

    found = []
    for each in client_figures(loaded, samples, lambda text: _say(console, text)):
        found.append(each)
        if console.is_terminal:
            _say(console, f"{label(each.client)}: {each.n_rows} train rows measured")
    console.print()
    console.print(
        Text("PAC-Bayes style figure of each client: an error rate of tokens, on train rows")
    )
    console.print(_figure_table(found))
    n_vacuous = sum(each.vacuous for each in found)
    _say(console, f"{n_vacuous} of {len(found)} figures are vacuous")
    _say(console, CAVEAT.format(sure=1 - DELTA))


def _figure_table(found: Sequence[ClientFigure]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("client", overflow="fold")
    table.add_column("its model", no_wrap=True)
    for name in ("rows", "‖w-w₀‖", "σ", "KL", "error", "figure", "backbone"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for each in found:
        table.add_row(
            Text(label(each.client)),
            Text(plain(each.candidate)),
            str(each.n_rows),
            f"{each.distance:.3g}",
            "" if each.sigma is None else f"{each.sigma:g}",
            f"{each.divergence:.3g}",
            "" if each.error is None else f"{each.error:.3f}",
            f"{each.figure:.3f}",
            f"{each.backbone:.3f}",
            each.verdict,
        )
    return table


def _say(console: Console, text: str) -> None:
    console.print(Text(plain(text)))

"""``pfl-lm validate``: check a recipe and its files, say what a run would be, write nothing."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from pfl_lm.cli.exits import label, plain
from pfl_lm.data.labels import task_of
from pfl_lm.data.sources import sources_said
from pfl_lm.data.words import quoted
from pfl_lm.preflight import Checked, check_recipe
from pfl_lm.recipe.privacy import loose_deltas

MOST_CLIENTS = 20
"""How many clients are listed; of the rest, only their number."""


def validate(recipe: Path, overrides: list[str]) -> None:
    """Check a recipe and everything it names, and print what a run of it would be.

    Raises:
        PflError: anything is wrong, with all that is.
    """
    checked = check_recipe(recipe, overrides)
    typer.echo(plain(_report(checked)))
    verbs = ["finetune"] + ["compare"] * (checked.loaded.recipe.compare is not None)
    commands = [shlex.join(["pfl-lm", verb, str(recipe), *overrides]) for verb in verbs]
    typer.echo(plain(f"Next: {', or all it compares: '.join(commands)}"))


def _report(checked: Checked) -> str:
    recipe = checked.loaded.recipe
    clients = checked.clients
    lines = [
        f"{checked.loaded.path} is valid.",
        f"  method      {recipe.method.name}, {recipe.federation.rounds} rounds "
        f"of {recipe.training.length}",
        f"  data        {_data(checked)}",
        *_labels(checked),
        f"  clients     {len(clients)}, with rows for train / validation / test:",
    ]
    shown = [(label(client), rows) for client, rows in list(clients.items())[:MOST_CLIENTS]]
    width = max(len(name) for name, _ in shown)
    for (name, rows), client in zip(shown, clients, strict=False):
        counts = f"{len(rows.train)} / {len(rows.validation)} / {len(rows.test)}"
        others = recipe.own_differences(client, len(rows.train))
        lines.append(f"    {name:<{width}}  {counts}{f'  {others}' if others else ''}")
    if len(clients) > MOST_CLIENTS:
        lines.append(f"    and {len(clients) - MOST_CLIENTS} more")
    lines.append(f"  run folder  {checked.loaded.run_folder}")
    lines += [f"  note        {told}" for told in checked.notes]
    n_train = {client: len(rows.train) for client, rows in clients.items()}
    lines += [f"  note        {told}" for told in loose_deltas(recipe.privacy, n_train)]
    return "\n".join(lines)


def _labels(checked: Checked) -> list[str]:
    """Say which classes there are, of a task that has some."""
    task = task_of(checked.loaded.recipe, checked.clients)
    return [f"  labels      {len(task.labels)}: {quoted(task.labels)}"] if task.labels else []


def _data(checked: Checked) -> str:
    """Say the format of the rows, how it is known, and where they are."""
    options = checked.loaded.recipe.data
    format = next(iter(checked.clients.values())).train[0].format
    known = "told by its columns" if options.format == "auto" else "as data.format says"
    if checked.loaded.recipe.task == "sequence_classification":
        known = "as task says"
    made = "" if options.partition is None else f"; clients by {options.partition.name}"
    return f"{format}, {known}, from {sources_said(options)}{made}"

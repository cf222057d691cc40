"""``pfl-lm init``: a recipe for a file of data, to be read and changed."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from pfl_lm.cli.exits import plain
from pfl_lm.data.files import RawRow, find_files
from pfl_lm.data.records import SPLITS
from pfl_lm.data.words import did_you_mean, quoted, short
from pfl_lm.errors import DataError, PflError
from pfl_lm.files import write_atomically
from pfl_lm.preflight import check_recipe
from pfl_lm.recipe.write import write_yaml

CLIENT, SPLIT = "client", "split"
"""The columns that are taken for these without being told."""

_RECIPE = """\
# {name}: written by `pfl-lm init`; every key is in docs/recipes.md.
#
#   pfl-lm validate {file}
#   pfl-lm finetune {file}

{name_line}seed: 0

backbone:                      # the frozen language model that all clients share
  {backbone}
data:
  {data}
  max_length: 512              # tokens; longer rows lose their end, or data.on_long says what else
federation:
  rounds: 10
training:
  learning_rate: 0.002         # `pfl-lm compare` finds out which is best
  max_steps: 10                # optimizer steps of a client in a round
  per_device_train_batch_size: 4
method:                        # pFLAlign on AdamW's direction
  name: pflalign
  precondition_target: update
  update_scale: match
"""


def init(data: Path, client_column: str | None, model: str, output: Path) -> None:
    """Look at a file of rows, or a folder of one file for each client, and write a recipe for it.

    Raises:
        PflError: the data cannot be used, or do not say whose rows they are; or there is a file
            where the recipe should be.
    """
    if output.exists():
        raise PflError(f"{output} is there already", hint="name another file with --output")
    files = find_files(str(data.absolute()))
    rows = [row for file in files for row in file.rows()]
    found = _values(rows)
    keys: dict[str, object] = {"path": _path(data, output)}
    if files[0].client is None:
        keys["client_column"] = _client_column(data, client_column, found)
    if SPLIT in found and found[SPLIT] <= {*SPLITS}:
        keys["split_column"] = SPLIT
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", data.resolve().stem).strip("-._")[:80] or "clients"
    text = _RECIPE.format(
        name=name,
        file=shlex.quote(str(output)),
        name_line=write_yaml({"name": name}),
        backbone=write_yaml({"model_name_or_path": model}).rstrip(),
        data=write_yaml(keys).rstrip().replace("\n", "\n  "),
    )
    write_atomically(output, text.encode())
    try:
        check_recipe(output, to_run=False)
    except PflError:
        output.unlink()
        raise
    typer.echo(plain(f"{output} is written: {_said(rows, keys, found)}"))
    typer.echo(plain(f"Next: {shlex.join(['pfl-lm', 'validate', str(output)])}"))


def _values(rows: Sequence[RawRow]) -> Mapping[str, set[object]]:
    """Return the values of each column that holds nothing but text and whole numbers."""
    found: defaultdict[str, set[object]] = defaultdict(set)
    other: set[str] = set()
    for row in rows:
        for column, value in row.columns.items() if isinstance(row.columns, dict) else ():
            if isinstance(value, bool) or not isinstance(value, int | str):
                other.add(column)
            else:
                found[column].add(value)
    return {column: values for column, values in found.items() if column not in other}


def _client_column(data: Path, asked: str | None, found: Mapping[str, set[object]]) -> str:
    column = asked or CLIENT
    if column in found:
        return column
    some = ", ".join(f"{short(name)} ({len(values)})" for name, values in found.items())
    there = f"columns there, with how many values each: {some or 'none'}"
    meant = did_you_mean(column, {name: name for name in found}) if asked else ""
    raise DataError(
        f"{data}: no column {short(column)} says whose rows they are; {there}{meant}",
        hint="name it: --client-column COLUMN; where no column does, data.partition in a recipe "
        "makes clients (docs/data.md)",
    )


def _path(data: Path, output: Path) -> str:
    """Return the data's path as it is seen from the recipe, if they are near each other."""
    whole, folder = data.absolute(), output.absolute().parent
    return str(whole.relative_to(folder)) if whole.is_relative_to(folder) else str(whole)


def _said(
    rows: Sequence[RawRow], keys: Mapping[str, object], found: Mapping[str, set[object]]
) -> str:
    column = keys.get("client_column")
    if column is None:
        return f"{len(rows)} rows, a client for each file"
    n = len(found[str(column)])
    return f"{len(rows)} rows of {n} clients, by {quoted([str(column)])}"

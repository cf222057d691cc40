"""A run that has begun: what it is and whether it may go on. Torch-free.

The ledger holds the recipe of a run, every default filled in, and of each client a SHA-256 of its
rows. A run goes on with just these, or not at all.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Set
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from pfl_lm.data.population import capped, read_population
from pfl_lm.data.sources import read_records
from pfl_lm.data.splits import ClientRows, split_clients
from pfl_lm.data.words import short
from pfl_lm.errors import DataError, PflError, RecipeError, RunFolderError, listed
from pfl_lm.federation.folder import LEDGER, RESOLVED, SLUG
from pfl_lm.federation.history import History, Member, client_digest
from pfl_lm.federation.schema import connect
from pfl_lm.recipe import LoadedRecipe, Recipe
from pfl_lm.recipe.draft import draft_of
from pfl_lm.recipe.load import check_draft
from pfl_lm.recipe.scalars import show

HARMLESS = frozenset(
    {
        *("federation.min_clients", "federation.rounds"),
        *("data.path", "data.package", "data.data_file", "data.dataset_name", "data.revision"),
        *("data.dataset_config_name", "data.dataset_train_split"),
        *("data.dataset_validation_split", "data.dataset_test_split"),
        *("runtime.output_dir", "runtime.parallel", "runtime.threads", "runtime.tracking"),
        *("runtime.diagnostics", "runtime.token_cache", "training.gradient_checkpointing"),
    }
)
"""Keys in which a recipe may differ from its run's: they leave every number of it alone.

Save for last digits: those of ``runtime.threads``, and of ``runtime.parallel`` where ranks share
turns, which is then said.

The rows are compared by themselves, wherever they come from; more rounds extend the run.
"""


class _Glance(History):
    """The read side of a ledger that somebody else may be writing."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection


@contextmanager
def glance(folder: Path) -> Iterator[History | None]:
    """Open the ledger of a folder for reading; None if no run has begun there.

    Raises:
        RunFolderError: it cannot be read, is no ledger of ours, or of a newer version.
    """
    path = folder / LEDGER
    if not path.is_file():
        yield None
        return
    with closing(connect(path)) as connection:
        found = _Glance(path, connection)
        yield found if found.about() else None


def has_begun(folder: Path) -> bool:
    """Return whether there is a run in this folder to go on with."""
    with glance(folder) as ledger:
        return ledger is not None


def run_recipe(folder: Path, rounds: int | None = None) -> LoadedRecipe:
    """Return the recipe of the run in ``folder``, with another number of rounds if one is given.

    Raises:
        RunFolderError: there is no run, its recipe was changed, or fewer rounds are asked for than
            have begun.
    """
    folder = folder.absolute()
    with glance(folder) as ledger:
        if ledger is None:
            raise _no_run(folder)
        about = ledger.about()
    path = folder / RESOLVED
    stored = about.get("recipe")
    try:
        written = path.read_text(encoding="utf-8") if path.is_file() else None
        text = stored or written
        if text is None:
            raise RunFolderError(f"{path}: the recipe of this run is not there")
        loaded = check_draft(draft_of(text.encode(), path))
        if stored is not None and written is not None and written != stored:
            refuse_differences(loaded.recipe, check_draft(draft_of(written.encode(), path)))
    except (OSError, UnicodeError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error})") from error
    return with_rounds(replace(loaded, folder=folder), rounds)


def finished_rounds(folder: Path) -> int | None:
    """Return how many rounds a run was finished with, exported and all; None if it is not."""
    with glance(folder) as ledger:
        finished = None if ledger is None else ledger.number("finished")
    return None if finished is None else int(finished)


def with_rounds(loaded: LoadedRecipe, rounds: int | None) -> LoadedRecipe:
    """Return a run's recipe with another number of rounds, if one is given.

    Raises:
        RecipeError: there are fewer rounds than have begun.
    """
    with glance(loaded.run_folder) as ledger:
        begun = 0 if ledger is None else max(ledger.last_begun(), ledger.last_round() or 0)
    federation = loaded.recipe.federation
    rounds = federation.rounds if rounds is None else rounds
    if rounds < max(begun, 1):
        raise RecipeError(
            f"federation.rounds: {rounds}, and round {begun} of this run has begun already",
            hint=f"the least is {max(begun, 1)}",
        )
    changed = {"federation": federation.model_copy(update={"rounds": rounds})}
    return replace(loaded, recipe=loaded.recipe.model_copy(update=changed))


def refuse_differences(stored: Recipe, given: LoadedRecipe) -> None:
    """Make sure that a recipe is the one its run began with, as far as it matters.

    Raises:
        RecipeError: it is not; every key that differs is named with both values.
    """
    if problems := differences(stored, given.recipe, HARMLESS):
        raise RecipeError(
            listed(f"{given.path}: not the recipe this run began with", problems),
            hint="put these keys back to resume, or give the recipe another `name` to start anew",
        )


def differences(stored: Recipe, given: Recipe, harmless: Set[str]) -> list[str]:
    """Return a line for each key in which two recipes differ, but for those that may."""
    one, other = _flat(stored.run_options()), _flat(given.run_options())
    if given.data.labels is None:  # those that the run has found in its rows
        other["data.labels"] = one["data.labels"]
    return [
        f"{key}: {_said(other.get(key))}, and the run began with {_said(one.get(key))}"
        for key in sorted({*one, *other} - harmless)
        if one.get(key) != other.get(key)
    ]


def run_clients(loaded: LoadedRecipe) -> dict[str, ClientRows]:
    """Return the rows of every client of a run, each what it was when the client came.

    Raises:
        RunFolderError: there is no run.
        DataError: a client's rows have changed or are gone, or there is a client that has not
            joined; all such clients are named.
    """
    with glance(loaded.run_folder) as ledger:
        if ledger is None:
            raise _no_run(loaded.run_folder)
        members = {member.client: member for member in ledger.members()}
        removed = ledger.removed()
    population = read_population(loaded.recipe.data)
    later = {c: rows for c, rows in population.held_out.items() if c in members}
    found = population.clients | later
    for member in members.values():
        if member.data_path:
            found |= rows_of_one(loaded, member.client, Path(member.data_path))
    found = {client: rows for client, rows in found.items() if client_digest(client) not in removed}
    _compare(loaded, members, found)
    return dict(sorted(found.items()))


def run_slugs(folder: Path) -> dict[str, str]:
    """Return the folder name of each client of a run.

    Raises:
        RunFolderError: there is no run, or it holds a name that is none.
    """
    with glance(folder) as ledger:
        if ledger is None:
            raise _no_run(folder)
        names = {member.client: member.slug for member in ledger.members()}
    for client, slug in names.items():
        if not SLUG.fullmatch(slug):
            raise RunFolderError(
                f"{folder}: the ledger gives client {client!r} the folder {slug!r}"
            )
    return names


def run_way(folder: Path) -> str | None:
    """Return what a run's ranks shared when it began; None if it does not say."""
    with glance(folder) as ledger:
        return None if ledger is None else ledger.about().get("parallel")


def rows_of_one(loaded: LoadedRecipe, client: str, path: Path) -> dict[str, ClientRows]:
    """Return the rows of one client from a file of its own, split as the recipe says.

    The file may name the client in the recipe's client column, or have no such column.

    Raises:
        DataError: the file cannot be used, or holds rows of somebody else.
    """
    data = loaded.recipe.data.of_file(str(path))
    rows = {
        name: capped(own, data.max_train_samples)
        for name, own in split_clients(
            read_records(data, only=client), data.validation_fraction
        ).items()
    }
    if strangers := sorted(rows.keys() - {client}):
        raise DataError(
            f"{path}: rows of {strangers[0]!r}, and only {client!r} was announced",
            hint="give each client a file of its own",
        )
    return rows


def rows_kept(loaded: LoadedRecipe, client: str) -> dict[str, ClientRows]:
    """Return the rows of one client that the recipe keeps for later.

    Raises:
        DataError: it keeps no such client.
    """
    kept = read_population(loaded.recipe.data).held_out
    if client not in kept:
        some = ", ".join(short(name) for name in list(kept)[:5]) or "none"
        raise DataError(
            f"--id: {client!r} is not among the clients that data.holdout_clients keeps ({some})",
            hint="name one of them, or give the client's rows with --data FILE",
        )
    return {client: kept[client]}


def _compare(
    loaded: LoadedRecipe, members: Mapping[str, Member], found: Mapping[str, ClientRows]
) -> None:
    problems = []
    for client, member in members.items():
        if client not in found:
            problems.append(f"client {client!r}: its rows are gone")
        elif member.rows_sha256 not in (None, found[client].sha256):
            problems.append(f"client {client!r}: its rows are not those the run began with")
    problems += [f"client {c!r}: not of this run" for c in sorted(found.keys() - members.keys())]
    if problems:
        run = loaded.run_folder
        raise DataError(
            listed(loaded.recipe.data.source, problems),
            hint=f"put the rows back; a client comes with `pfl-lm join {run} --id ID --data FILE` "
            f"and goes with `pfl-lm remove {run} --id ID`",
        )


def _no_run(folder: Path) -> PflError:
    what = "no run has begun in this folder" if folder.is_dir() else "there is no such folder"
    return RunFolderError(
        f"{folder}: {what}", hint="start one with `pfl-lm finetune RECIPE`, then resume it"
    )


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else show(value)


def _flat(data: Mapping[str, object], above: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in data.items():
        name = f"{above}{key}"
        if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
            value = {f"[{i}]": each for i, each in enumerate(value)}
            flat |= {f"{name}{key}": each for key, each in _flat(value).items()}
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat

"""The beginning of a run in its folder, and of every attempt to go on with it.

A run has begun once the ledger's ``run`` and ``clients`` have their rows, in one commit. Everything
before that may be thrown away; everything after it is gone on with.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pfl_lm.errors import PflError, RunFolderError, listed
from pfl_lm.federation.folder import FOLDERS, GIVEN, LEDGER, RESOLVED, UNFINISHED
from pfl_lm.federation.history import Member
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.lock import run_lock
from pfl_lm.federation.store import Store
from pfl_lm.federation.watch import Watch
from pfl_lm.files import explained, make_folder, write_atomically
from pfl_lm.recipe import LoadedRecipe

_MAY_DIFFER = (
    *("device", "threads", "parallel", "pfl_lm", "python"),
    *("torch", "lightning", "transformers", "peft", "bitsandbytes"),
)


@contextmanager
def begun(
    loaded: LoadedRecipe, about: Mapping[str, str], members: list[Member]
) -> Iterator[Ledger]:
    """Begin a run in a folder that is free, and hold it while the body runs.

    Raises:
        RunFolderError: another process holds the folder, or has begun a run there, or it cannot be
            written.
    """
    folder = loaded.run_folder
    with explained(folder):
        make_folder(folder)
    with run_lock(folder):
        _remove_unfinished(folder)
        ledger = Ledger(folder / LEDGER)  # first, as a sign that what comes next is ours
        try:
            _refuse_another_run(ledger, folder)
            write_atomically(folder / GIVEN, loaded.source_text.encode())
            write_atomically(folder / RESOLVED, loaded.resolved().encode())
            ledger.open_run({**about, "recipe": loaded.resolved()}, members)
            with _attempt(ledger):
                yield ledger
        finally:
            ledger.close()


@contextmanager
def gone_on_with(
    loaded: LoadedRecipe, about: Mapping[str, str], store: Store, watch: Watch
) -> Iterator[Ledger]:
    """Go on with a run that has begun, and hold its folder while the body runs.

    What an interruption has left half done is removed; every file that is needed is checked.

    Raises:
        RunFolderError: another process holds the folder, it is not what its ledger says, leads
            somewhere else by a link, or was begun with another backbone.
    """
    folder = loaded.run_folder
    refuse_links(folder)
    with run_lock(folder):
        ledger = Ledger(folder / LEDGER)
        try:
            refuse_other_backbone(ledger.about(), about, folder)
            store.check(ledger.live_files())
            store.sweep(ledger.live_files())
            for note in _differences(ledger.about(), about):
                watch.note(note)
            ledger.note("recipe", loaded.resolved())
            _write_again(loaded)
            with _attempt(ledger):
                yield ledger
        finally:
            ledger.close()


def refuse_links(folder: Path) -> None:
    """Make sure that no folder of a run is a link to somewhere else.

    Raises:
        RunFolderError: some are; all are named.
    """
    places = [path for pattern in ("global", "logs", *FOLDERS) for path in folder.glob(pattern)]
    links = [str(path) for path in sorted(places) if path.is_symlink()]
    if links:
        raise RunFolderError(
            listed(f"{folder}: links in a run folder are not followed", links),
            hint="put the folders themselves in their places",
        )


def refuse_other_backbone(then: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    """Make sure that a run goes on, or is looked at, with the backbone that it began with.

    Raises:
        RunFolderError: it is another one; ``then`` and ``now`` are what a run notes of itself.
    """
    if then.get("backbone", now["backbone"]) != now["backbone"]:
        raise RunFolderError(
            f"{folder}: this run began on another backbone than the one that was loaded",
            hint="put the weights back that it began with; or start a run of another name",
        )


def _refuse_another_run(ledger: Ledger, folder: Path) -> None:
    """Look once more, under the lock, at what was looked at before."""
    if ledger.about():
        raise RunFolderError(
            f"{folder}: another process has begun a run here in the meantime",
            hint=f"go on with it by `pfl-lm resume {shlex.quote(str(folder))}`",
        )


def _remove_unfinished(folder: Path) -> None:
    """Remove what a process has left that was killed before the run began."""
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name):
            with explained(path):
                path.unlink()


@contextmanager
def _attempt(ledger: Ledger) -> Iterator[None]:
    attempt = ledger.begin_attempt()
    try:
        yield
    except BaseException as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        how = "failed" if isinstance(error, Exception) else "interrupted"
        with suppress(PflError):
            ledger.end_attempt(attempt, f"{how}: {what}")
        raise
    ledger.end_attempt(attempt, "finished")


def _write_again(loaded: LoadedRecipe) -> None:
    """Write the recipe's files where they are missing or behind the ledger."""
    given, resolved = (loaded.run_folder / name for name in (GIVEN, RESOLVED))
    if not given.exists():
        write_atomically(given, loaded.source_text.encode())
    content = loaded.resolved().encode()
    if not resolved.is_file() or resolved.read_bytes() != content:
        write_atomically(resolved, content)


def _differences(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    changed = [
        f"{key} {now[key]} (then {then[key]})"
        for key in _MAY_DIFFER
        if key in then and key in now and then[key] != now[key]
    ]
    if then.get("trace", now.get("trace")) != now.get("trace"):
        yield "federation.availability: the trace has changed since the run began"
    if changed:
        yield f"not as when the run began: {', '.join(changed)}; last digits may differ"

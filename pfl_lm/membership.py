"""Clients that come to a run late, and clients that leave it."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

import torch

from pfl_lm.data.federated import FederatedDataset
from pfl_lm.data.splits import ClientRows, rows_to_train
from pfl_lm.errors import PflError, RunFolderError
from pfl_lm.export.index import NAME, read_index
from pfl_lm.federation.folder import LEDGER
from pfl_lm.federation.history import Member
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.lock import run_lock
from pfl_lm.federation.opening import refuse_links
from pfl_lm.federation.slugs import slug_beside
from pfl_lm.federation.store import Store
from pfl_lm.files import explained, write_atomically
from pfl_lm.model.outline import find_source, load_tokenizer
from pfl_lm.recipe import LoadedRecipe, ScaffoldOptions
from pfl_lm.report.diagnostics import refresh_diagnostics
from pfl_lm.report.metrics import write_metrics
from pfl_lm.resume import rows_kept, rows_of_one, run_recipe


def join(folder: Path, client: str, data: Path | None = None) -> Member:
    """Make a client a member of a run that has begun; return it as it was noted.

    It takes part from the round after the last one that is over. Its first turn is taken when the
    run is gone on with: local steps from the shared weights, which nothing is averaged with. The
    file stays where it is, and is needed there again. Without one, it is a client that the recipe's
    ``data.holdout_clients`` has kept for later.

    Raises:
        PflError: it is a member already, its rows cannot be used, or there is no run.
    """
    loaded = run_recipe(folder)
    with run_lock(loaded.run_folder), closing(Ledger(loaded.run_folder / LEDGER)) as ledger:
        members = {member.client: member for member in ledger.members()}
        if client in members:
            raise PflError(
                f"--id: {client!r} is a client of this run already",
                hint="to give it other rows, remove it first: "
                + shlex.join(["pfl-lm", "remove", str(folder), "--id", client]),
            )
        if data is None:
            rows = rows_kept(loaded, client)
        else:
            rows = rows_of_one(loaded, client, data.absolute())
        made = _dataset(loaded, rows)[client]
        member = Member(
            client,
            slug_beside(client, (each.slug for each in members.values())),
            len(made.train),
            len(made.validation),
            len(made.test_rows),
            rows_sha256=rows[client].sha256,
            joined=ledger.last_round() or 0,
            data_path="" if data is None else str(data.absolute()),
        )
        ledger.add_member(member)
    return member


def remove(folder: Path, client: str, *, replay: bool = False) -> Member:
    """Take a client out of a run: its state, adapter, card, scores and every row of the ledger.

    What the shared weights have learned from it stays in them, unless ``replay`` forgets every
    round, to be run again without it.

    Raises:
        PflError: it is no member, or the only one; or the method needs ``replay``.
    """
    loaded = run_recipe(folder)
    refuse_links(loaded.run_folder)
    if replay and loaded.recipe.privacy.first_asked:
        raise PflError(
            "--replay: this run has a privacy lever, and what its rounds have spent would be "
            "forgotten with them, while what they have released is out",
            hint="remove the client without --replay, or begin a run of another name",
        )
    with run_lock(loaded.run_folder), closing(Ledger(loaded.run_folder / LEDGER)) as ledger:
        member = _member(ledger, client, folder)
        if not replay:
            _refuse_sums(loaded, member, folder)
        # Files go first: should this be cut short, the client is still there to be removed again.
        _remove_export(loaded.run_folder, member)
        _remove_tree(loaded.run_folder / "clients" / member.slug)
        store = Store(loaded.run_folder, {}, torch.device("cpu"))
        store.discard(ledger.remove_member(member.client, replay=replay))
        if replay:
            for name in ("adapters", "global", "logs"):
                _remove_tree(loaded.run_folder / name)
            _remove_file(loaded.run_folder / NAME)
        write_metrics(loaded.run_folder / "metrics.csv", ledger)
        refresh_diagnostics(loaded.run_folder, ledger)
    return member


def _member(ledger: Ledger, name: str, folder: Path) -> Member:
    """Return the member of that id or, if there is none, of that slug."""
    members = ledger.members()
    found = [m for m in members if m.client == name] or [m for m in members if m.slug == name]
    if not found:
        ids = ", ".join(repr(member.client) for member in members[:5])
        more = ", …" if len(members) > 5 else ""
        raise PflError(f"--id: {folder} has no client {name!r}", hint=f"it has {ids}{more}")
    if len(members) == 1:
        raise PflError(
            f"--id: {name!r} is the only client of this run",
            hint=f"remove the whole folder instead: {folder}",
        )
    return found[0]


def _refuse_sums(loaded: LoadedRecipe, member: Member, folder: Path) -> None:
    """Refuse to take a client out of a sum that the server keeps over all of them."""
    if isinstance(loaded.recipe.method, ScaffoldOptions):
        again = ["pfl-lm", "remove", str(folder), "--id", member.client, "--replay"]
        raise PflError(
            "--id: scaffold's server keeps the sum of all clients' control variates, and that of "
            f"{member.client!r} cannot be taken out of it",
            hint=f"have every round run again without it: {shlex.join(again)}",
        )


def _dataset(loaded: LoadedRecipe, rows: Mapping[str, ClientRows]) -> FederatedDataset:
    options = loaded.recipe.backbone
    tokenizer = load_tokenizer(find_source(options, lambda text: None), options)
    recipe = loaded.recipe
    lengths = recipe.own_lengths(rows_to_train(rows))
    return FederatedDataset.build(rows, tokenizer, *recipe.data.length, lengths, recipe.task_for())


def _remove_export(folder: Path, member: Member) -> None:
    """Take a client's adapter away, and its entry in the index, if the run has got that far."""
    index = folder / NAME
    if index.exists():
        with suppress(PflError):  # an index that cannot be read is written anew by the run
            parsed = read_index(folder)
            others = {c: entry for c, entry in parsed.clients.items() if c != member.client}
            if others:
                write_atomically(index, parsed.model_copy(update={"clients": others}).text())
            else:
                _remove_file(index)
    _remove_tree(folder / "adapters" / member.slug)


def _remove_tree(path: Path) -> None:
    if path.is_symlink():
        raise RunFolderError(f"{path}: a link; what it leads to is not removed")
    with explained(path):
        if path.is_dir():
            shutil.rmtree(path)


def _remove_file(path: Path) -> None:
    with explained(path):
        path.unlink(missing_ok=True)

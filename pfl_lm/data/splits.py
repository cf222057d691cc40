"""From rows to clients: who has which rows, and which of them are held out.

No torch here. What is held out follows from a hash of each row, so that neither the order of the
file nor the other clients nor the process that computes it matter, and equal rows never face each
other across the border. Where the rows have groups, the hash is the group's: see ``groups``.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pfl_lm.data.groups import check_groups, digest, held_out_groups
from pfl_lm.data.problems import Problems
from pfl_lm.data.records import Record
from pfl_lm.data.words import short


@dataclass(frozen=True, slots=True)
class ClientRows:
    """One client's rows by split, each in file order."""

    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]

    @property
    def sha256(self) -> str:
        """What tells these rows from others: their content and splits, in order."""
        made = hashlib.sha256()
        for split in ("train", "validation", "test"):
            for row in getattr(self, split):
                made.update(digest(split, *row.content.parts))
        return made.hexdigest()


def rows_to_train(clients: Mapping[str, ClientRows]) -> dict[str, int]:
    """Return how many train rows each client has, as they were read."""
    return {client: len(rows.train) for client, rows in clients.items()}


def split_clients(records: Sequence[Record], validation_fraction: float) -> dict[str, ClientRows]:
    """Sort the rows by client, in the order of the clients' ids.

    If no row of all the data is in ``validation``, each client's validation rows are the
    ``max(1, round(validation_fraction * n))`` of its ``n`` train rows whose hash is smallest, and
    any row equal to one of them; or, where rows have groups, as many whole groups as fit into that
    share, at least one.

    Raises:
        DataError: a client has no train or no validation row, or a group of it stands in several
            splits; all such clients or groups are named.
    """
    check_groups(records)
    by_client: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_client[record.client].append(record)
    file_holds_out = any(record.split == "validation" for record in records)
    clients = {
        client: _as_given(rows) if file_holds_out else _held_out(rows, validation_fraction)
        for client, rows in sorted(by_client.items())
    }
    _check(clients, file_holds_out, validation_fraction)
    return clients


def _as_given(rows: list[Record]) -> ClientRows:
    train, validation, test = (
        tuple(row for row in rows if row.split == split)
        for split in ("train", "validation", "test")
    )
    return ClientRows(train, validation, test)


def _held_out(rows: list[Record], fraction: float) -> ClientRows:
    given = _as_given(rows)
    if not given.train:
        return given
    if given.train[0].group is None:
        hashes = [digest(row.client, *row.content.parts) for row in given.train]
        last = sorted(hashes)[min(max(1, round(fraction * len(hashes))), len(hashes)) - 1]
        out = [key <= last for key in hashes]
    else:
        groups = held_out_groups(given.train[0].client, given.train, fraction)
        out = [row.group in groups for row in given.train]
    return ClientRows(
        train=tuple(row for row, held in zip(given.train, out, strict=True) if not held),
        validation=tuple(row for row, held in zip(given.train, out, strict=True) if held),
        test=given.test,
    )


def _check(clients: dict[str, ClientRows], file_holds_out: bool, fraction: float) -> None:
    problems = Problems()
    hint = f"give these clients more rows, or lower data.validation_fraction ({fraction})"
    for client, rows in clients.items():
        n_train, n_validation = len(rows.train), len(rows.validation)
        if n_train and n_validation:
            continue
        if file_holds_out or not (n_train or n_validation):
            missing = "train" if not n_train else "validation"
            problems.add(f"client {short(client)}: no {missing} rows")
        elif rows.validation[0].group is not None:
            problems.add(
                f"client {short(client)}: all {n_validation} of its train rows are of one group, "
                f"{short(rows.validation[0].group)}"
            )
            hint = "each client needs rows of two groups: one to train on, one to hold out"
        else:
            problems.add(
                f"client {short(client)}: all {n_validation} of its train rows would be held out "
                "for validation, and none left to train on"
            )
    if file_holds_out:
        hint = "the file has validation rows of its own, so every client needs some of both kinds"
    problems.raise_if_any("data", hint=hint)

"""From rows to clients: who has which rows, and which of them are held out.

No torch here. What is held out follows from a hash of each row, so that neither the order of the
file nor the other clients nor the process that computes it matter, and equal rows never face each
other across the border.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pfl_lm.data.problems import Problems
from pfl_lm.data.records import Record


@dataclass(frozen=True, slots=True)
class ClientRows:
    """One client's rows by split, each in file order."""

    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]


def split_clients(records: Sequence[Record], validation_fraction: float) -> dict[str, ClientRows]:
    """Sort the rows by client, in the order of the clients' ids.

    If no row of all the data is in ``validation``, each client's validation rows are the
    ``max(1, round(validation_fraction * n))`` of its ``n`` train rows whose hash is smallest, and
    any row equal to one of them.

    Raises:
        DataError: a client has no train or no validation row; all such clients are named.
    """
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
    hashes = [_hash(row) for row in given.train]
    last = sorted(hashes)[min(max(1, round(fraction * len(hashes))), len(hashes)) - 1]
    out = [key <= last for key in hashes]
    return ClientRows(
        train=tuple(row for row, held in zip(given.train, out, strict=True) if not held),
        validation=tuple(row for row, held in zip(given.train, out, strict=True) if held),
        test=given.test,
    )


def _hash(row: Record) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for text in (row.client, *row.content.parts):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def _check(clients: dict[str, ClientRows], file_holds_out: bool, fraction: float) -> None:
    problems = Problems()
    hint = f"give these clients more rows, or lower data.validation_fraction ({fraction})"
    for client, rows in clients.items():
        n_train, n_validation = len(rows.train), len(rows.validation)
        if n_train and n_validation:
            continue
        if file_holds_out or not (n_train or n_validation):
            missing = "train" if not n_train else "validation"
            problems.add(f"client {client!r}: no {missing} rows")
        else:
            problems.add(
                f"client {client!r}: all {n_validation} of its train rows would be held out for "
                "validation, and none left to train on"
            )
    if file_holds_out:
        hint = "the file has validation rows of its own, so every client needs some of both kinds"
    problems.raise_if_any("data.path", hint=hint)

"""Who takes part: the clients of the data, less those with too little and those kept for later.

No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pfl_lm.data.groups import digest
from pfl_lm.data.problems import Problems
from pfl_lm.data.records import Record
from pfl_lm.data.sources import read_records
from pfl_lm.data.splits import ClientRows, split_clients
from pfl_lm.data.words import did_you_mean, short
from pfl_lm.errors import DataError

if TYPE_CHECKING:
    from pfl_lm.recipe.data import DataOptions

MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Population:
    """The clients of a recipe's data, in the order of their ids.

    Attributes:
        clients: the rows of those that take part.
        held_out: the rows of those that `data.holdout_clients` keeps for later.
        small: the train rows of those that have fewer than `data.min_train_samples`.
        capped: how many of those that take part have more than `data.max_train_samples`.
    """

    clients: dict[str, ClientRows]
    held_out: dict[str, ClientRows]
    small: dict[str, int]
    capped: int = 0

    @property
    def notes(self) -> list[str]:
        """What to tell a person of those that do not take part, or not with all they have."""
        told = []
        if self.small:
            told.append(
                f"left out, with fewer than data.min_train_samples: {_named(list(self.small))}"
            )
        if self.held_out:
            told.append(f"kept for later by data.holdout_clients: {_named(list(self.held_out))}")
        if self.capped:
            of = f"{self.capped} of {len(self.clients)}"
            told.append(f"{of} clients have more train rows than data.max_train_samples lets in")
        return told


def read_population(options: DataOptions) -> Population:
    """Read the data and sort its clients.

    Raises:
        DataError: something in the data cannot be used, a client that is to be held out is not
            there, or nobody is left.
    """
    records = read_records(options)
    small = _small(records, options.min_train_samples)
    enough = [record for record in records if record.client not in small]
    if not enough:
        raise DataError(
            f"{options.source}: none of {len(small)} clients has {options.min_train_samples} train "
            "rows",
            hint="lower data.min_train_samples",
        )
    everybody = split_clients(enough, options.validation_fraction)
    later = _held_out(options, list(everybody))
    clients = {client: rows for client, rows in everybody.items() if client not in later}
    most = options.max_train_samples
    return Population(
        clients={client: capped(rows, most) for client, rows in clients.items()},
        held_out={client: capped(everybody[client], most) for client in sorted(later)},
        small=small,
        capped=sum(most is not None and len(rows.train) > most for rows in clients.values()),
    )


def capped(rows: ClientRows, most: int | None) -> ClientRows:
    """Return the rows with at most so many train rows: those whose hash is smallest, in order.

    What a smaller number leaves is part of what a larger one does.
    """
    if most is None or len(rows.train) <= most:
        return rows
    rank = sorted(range(len(rows.train)), key=lambda i: (_digest(rows.train[i]), i))[:most]
    return replace(rows, train=tuple(rows.train[i] for i in sorted(rank)))


def _digest(row: Record) -> bytes:
    return digest("cap", row.client, *row.content.parts)


def _small(records: Sequence[Record], least: int | None) -> dict[str, int]:
    if least is None:
        return {}
    n_train = Counter(record.client for record in records if record.split == "train")
    clients = sorted({record.client for record in records})
    return {client: n_train[client] for client in clients if n_train[client] < least}


def _held_out(options: DataOptions, clients: Sequence[str]) -> set[str]:
    asked = options.holdout_clients
    if isinstance(asked, int):
        later = set(sorted(clients, key=lambda client: digest("holdout", client))[:asked])
    else:
        known = {client: client for client in clients}
        problems = Problems()
        for client in asked:
            if client not in known:
                there = f"of those there are {_named(clients)}"
                meant = did_you_mean(client, known)
                problems.add(f"there is no client {short(client)} to hold out; {there}{meant}")
        problems.raise_if_any(options.source, hint="data.holdout_clients: name clients of the data")
        later = set(asked)
    if len(later) == len(clients):
        raise DataError(
            f"{options.source}: data.holdout_clients keeps all {len(clients)} clients for later",
            hint="leave some of them in",
        )
    return later


def _named(clients: Sequence[str]) -> str:
    """Return how many there are, and the first of them."""
    more = ", …" if len(clients) > MOST_NAMED else ""
    noun = "client" if len(clients) == 1 else "clients"
    return f"{len(clients)} {noun} ({', '.join(map(short, clients[:MOST_NAMED]))}{more})"

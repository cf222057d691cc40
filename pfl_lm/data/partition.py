"""Clients made out of rows that name none: ``data.partition``. Torch-free.

Rows are dealt by a hash of what they hold and the seed, so that their order in the file plays no
part; rows of one group stay together. What a client gets of the train rows it gets, in the same
shares, of the validation and test rows: it is scored on what it learns.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from pfl_lm.data.groups import digest
from pfl_lm.data.records import Record
from pfl_lm.errors import DataError

if TYPE_CHECKING:
    from pfl_lm.recipe.partition import PartitionOptions

Unit = list[Record]
"""Rows that stay together: one, or all of a group in one split."""

_TRIES = 10
_LEAST = 2
"""Train rows of a client with `dirichlet`, if the recipe does not say: one may be held out."""


def partitioned(path: str, records: Sequence[Record], options: PartitionOptions) -> list[Record]:
    """Return the rows with the clients that they are now of, in their order.

    Each has in ``label`` what it is told apart by, if the partition goes by that.

    Raises:
        DataError: there are fewer rows than clients, or no draw gives every client enough.
    """
    if options.name == "natural_id":
        return [replace(record, client=record.label or "") for record in records]
    sides = _sides(records, options.seed)
    _refuse_few(path, sides["train"], options)
    draw = random.Random(options.seed)
    match options.name:
        case "iid":
            dealt = _in_shares(sides, [1.0] * _n(options))
        case "by_size":
            dealt = _in_shares(sides, [float(size) for size in options.partition_sizes or ()])
        case "shards":
            dealt = _shards(sides, _n(options), options.num_shards_per_partition or 1, draw)
        case "dirichlet":
            dealt = _dirichlet(path, sides, options, draw)
    width = len(str(max(dealt.values(), default=0)))
    return [replace(record, client=f"client-{dealt[id(record)]:0{width}}") for record in records]


def _n(options: PartitionOptions) -> int:
    return options.num_partitions or len(options.partition_sizes or ())


def _sides(records: Iterable[Record], seed: int) -> dict[str, list[Unit]]:
    """Return the units of each split, in an order that only their content and the seed decide."""
    units: defaultdict[tuple[str, bytes, int], Unit] = defaultdict(list)
    for i, record in enumerate(records):
        if record.group is None:
            units[record.split, digest(str(seed), *record.content.parts), i].append(record)
        else:
            units[record.split, digest(str(seed), "group", record.group), -1].append(record)
    sides: dict[str, list[Unit]] = {"train": []}
    for split, hashed, i in sorted(units):
        sides.setdefault(split, []).append(units[split, hashed, i])
    return sides


def _refuse_few(path: str, train: list[Unit], options: PartitionOptions) -> None:
    pieces = _n(options) * (options.num_shards_per_partition or 1)
    if len(train) < pieces:
        rows = "groups of train rows" if train and train[0][0].group else "train rows"
        raise DataError(
            f"{path}: {len(train)} {rows} cannot make {pieces} pieces",
            hint=f"data.partition: ask for fewer of them, or give it more {rows}",
        )


def _cut(units: Sequence[Unit], shares: Sequence[float]) -> list[Sequence[Unit]]:
    """Cut units into pieces in these shares, borders rounded to the nearest unit."""
    total = sum(shares)
    borders = [0, *(round(len(units) * upto / total) for upto in accumulate(shares))]
    borders[-1] = len(units)
    return [units[first:last] for first, last in pairwise(borders)]


def _in_shares(sides: dict[str, list[Unit]], shares: Sequence[float]) -> dict[int, int]:
    """Return the client of each row, by the row's identity."""
    dealt: dict[int, int] = {}
    for units in sides.values():
        for client, piece in enumerate(_cut(units, shares)):
            dealt |= {id(record): client for unit in piece for record in unit}
    return dealt


def _shards(
    sides: dict[str, list[Unit]], n_clients: int, n_each: int, draw: random.Random
) -> dict[int, int]:
    """Sort by value, cut into pieces of one size, and give each client as many of them."""
    owners = [client for client in range(n_clients) for _ in range(n_each)]
    draw.shuffle(owners)
    dealt: dict[int, int] = {}
    for units in sides.values():
        by_value = sorted(units, key=lambda unit: unit[0].label or "")
        pieces = _cut(by_value, [1.0] * len(owners))
        for owner, piece in zip(owners, pieces, strict=True):
            dealt |= {id(record): owner for unit in piece for record in unit}
    return dealt


def _dirichlet(
    path: str, sides: dict[str, list[Unit]], options: PartitionOptions, draw: random.Random
) -> dict[int, int]:
    """Draw each value's shares from Dirichlet(α, …, α) until every client has enough train rows."""
    n, alpha = _n(options), options.alpha or 1.0
    least = options.min_partition_size or _LEAST
    by_value: dict[str, defaultdict[str, list[Unit]]] = {}
    for split, units in sides.items():
        of_split = by_value[split] = defaultdict(list)
        for unit in units:
            of_split[unit[0].label or ""].append(unit)
    values = sorted({value for of_split in by_value.values() for value in of_split})
    for _ in range(_TRIES):
        dealt: dict[int, int] = {}
        for value in values:
            shares = _shares(n, alpha, draw)
            dealt |= _in_shares({s: each[value] for s, each in by_value.items()}, shares)
        sizes = Counter(dealt[id(row)] for unit in sides["train"] for row in unit)
        if min(sizes[client] for client in range(n)) >= least:
            return dealt
    raise DataError(
        f"{path}: {_TRIES} draws of a Dirichlet distribution left a client fewer than {least} "
        "train rows each time",
        hint="data.partition: raise alpha, or lower num_partitions or min_partition_size",
    )


def _shares(n: int, alpha: float, draw: random.Random) -> list[float]:
    """Return one draw of Dirichlet(α, …, α): gamma variates, in proportion to each other."""
    shares = [draw.gammavariate(alpha, 1.0) for _ in range(n)]
    if sum(shares) > 0:
        return shares
    shares[draw.randrange(n)] = 1.0  # α so small that all of them vanish: one client has all
    return shares

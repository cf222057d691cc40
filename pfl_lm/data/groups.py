"""Rows that belong together, such as the passages of a document, stay on one side of the splits.

No torch here. A group is a client's own: the same name with two clients is two groups.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from pfl_lm.data.problems import Problems
from pfl_lm.data.records import SPLITS, Record, Split
from pfl_lm.data.words import short


def digest(*texts: str) -> bytes:
    """Return a hash of texts that depends on the borders between them too."""
    made = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode()
        made.update(len(data).to_bytes(8, "big") + data)
    return made.digest()


def held_out_groups(client: str, rows: Sequence[Record], fraction: float) -> set[str | None]:
    """Choose the groups of one client that are held out.

    In the order of a hash of their names, each group that still fits into the share of the rows is
    taken; if none does, the smallest one is.
    """
    sizes = Counter(row.group for row in rows)
    order = sorted(sizes, key=lambda group: digest(client, str(group)))
    room = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    chosen = set()
    for group in order:
        if sizes[group] <= room:
            chosen.add(group)
            room -= sizes[group]
    return chosen or {min(order, key=lambda group: sizes[group])}


def check_groups(records: Iterable[Record]) -> None:
    """Make sure that no group stands in two splits.

    Raises:
        DataError: some do; all are named.
    """
    firsts: dict[tuple[str, str], dict[Split, str]] = {}
    for record in records:
        if record.group is not None:
            sides = firsts.setdefault((record.client, record.group), {})
            sides.setdefault(record.split, record.place)
    problems = Problems()
    for (client, group), sides in firsts.items():
        if len(sides) > 1:
            there = " and ".join(f"{split} ({sides[split]})" for split in SPLITS if split in sides)
            problems.add(f"client {short(client)}: the group {short(group)} stands in {there}")
    problems.raise_if_any("data", hint="keep all rows of a group in the same split")

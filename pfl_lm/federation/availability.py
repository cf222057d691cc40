"""Who can be reached in which round: a trace, read strictly from a CSV file. Torch-free.

    round,client
    1,alice
    1,bob
    2,alice

A row says that a client can be reached in a round. Rounds count from 1 and none is left out. After
the trace's last round it starts again from its first. A column more is an error rather than passed
over: one that said `available: 0` would turn the trace around.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from pfl_lm.data.files import open_file
from pfl_lm.data.problems import Problems
from pfl_lm.data.tables import read_csv
from pfl_lm.data.words import did_you_mean, quoted, short
from pfl_lm.errors import SHOWN

KEY = "federation.availability"
_COLUMNS = ("round", "client")
_WHOLE = re.compile(r"-?[0-9]{1,18}")
_HINT = (
    "the file is CSV in UTF-8 with the columns round,client: a row for each client that can be "
    "reached in a round, and in each round from 1 to the last at least one"
)


@dataclass(frozen=True, slots=True)
class Trace:
    """The clients of each round of a trace, in id order; its first round first."""

    rounds: tuple[tuple[str, ...], ...]

    def clients(self, round: int) -> tuple[str, ...]:
        """Return who can be reached in a round, from 1; past the last, from the first again."""
        return self.rounds[(round - 1) % len(self.rounds)]


def read_trace(name: str, clients: Collection[str] | None) -> Trace:
    """Read the trace in the file ``name``.

    Args:
        name: the file.
        clients: the ids that there are; None if that is not known, and then any will do.

    Raises:
        DataError: the file cannot be read, or something in it cannot be used as it is; all that is
            wrong with it.
    """
    problems = Problems()
    rows_of: defaultdict[int, dict[str, int]] = defaultdict(dict)
    with open_file(name, KEY) as file:
        for number, row in read_csv(file):
            if not isinstance(row, str) and row.keys() != set(_COLUMNS):
                problems.add(
                    f"row 1: the columns are {quoted(row)}; must be round and client, and no other"
                )
                problems.raise_if_any(f"{KEY}: {name}", hint=_HINT)
            for fault in _take(number, row, rows_of):
                problems.add(f"row {number}: {fault}")
    if clients is not None:
        _note_strangers(rows_of, clients, problems)
    _note_gaps(rows_of, problems)
    if not rows_of and not problems:
        problems.add("there are no rows in it")
    problems.raise_if_any(f"{KEY}: {name}", hint=_HINT)
    return Trace(tuple(tuple(sorted(rows_of[round])) for round in sorted(rows_of)))


def _take(
    number: int, row: Mapping[str, object] | str, rows_of: Mapping[int, dict[str, int]]
) -> Iterator[str]:
    """Enter one row, or yield what is wrong with it."""
    if isinstance(row, str):
        yield row
        return
    cell, client = (str(row[column]) for column in _COLUMNS)
    whole = _WHOLE.fullmatch(cell) is not None
    if not whole:
        yield f"'round' must be a whole number, got {short(cell)}"
    elif int(cell) < 1:
        yield f"'round' must be at least 1, got {cell}"
    if not client.strip():
        yield "'client' is empty"
    elif whole and int(cell) >= 1:
        first = rows_of[int(cell)].setdefault(client, number)
        if first != number:
            yield f"client {short(client)} is there twice in round {int(cell)}, see row {first}"


def _note_strangers(
    rows_of: Mapping[int, Mapping[str, int]], clients: Collection[str], problems: Problems
) -> None:
    """Note each client that there is none of, once, where it stands first."""
    known = {client: client for client in clients}
    first: dict[str, int] = {}
    for rows in rows_of.values():
        for client, number in rows.items():
            if client not in known:
                first[client] = min(number, first.get(client, number))
    for n, (client, number) in enumerate(sorted(first.items(), key=lambda item: item[1])):
        meant = did_you_mean(client, known) if n < SHOWN else ""
        problems.add(f"row {number}: the data have no client {short(client)}{meant}")


def _note_gaps(rounds: Iterable[int], problems: Problems) -> None:
    """Note the rounds before the last that have no row."""
    before = 0
    for round in sorted(rounds):
        if round - before == 2:
            problems.add(f"round {round - 1} has no row, but round {round} has")
        elif round - before > 2:
            problems.add(f"rounds {before + 1} to {round - 1} have no row, but round {round} has")
        before = round

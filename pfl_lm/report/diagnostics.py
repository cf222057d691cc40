"""``diagnostics.csv``: what diagnosed turns have told, for spreadsheets and plots."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from pfl_lm.federation.folder import DIAGNOSTICS
from pfl_lm.federation.history import History
from pfl_lm.files import explained, write_atomically
from pfl_lm.quantities import told

COLUMNS = ("round", "client", "layer", "quantity", "value")


@dataclass(frozen=True, slots=True)
class Told:
    """One number of one turn; ``layer`` and ``quantity`` as in `pfl_lm.quantities`."""

    round: int
    client: str
    layer: str
    quantity: str
    value: float


def diagnosed(ledger: History) -> list[Told]:
    """Return all that a run's turns have told, in the order of round, client, layer, quantity."""
    return [
        Told(round, client, *each)
        for round, client, summary in ledger.turn_summaries()
        for each in told(summary)
    ]


def write_diagnostics(folder: Path, found: Iterable[Told]) -> Path:
    """Write ``diagnostics.csv`` into a run folder, and return its path.

    Raises:
        RunFolderError: it cannot be written.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    rows.writerows((*astuple(each)[:-1], repr(each.value)) for each in found)
    path = folder / DIAGNOSTICS
    write_atomically(path, text.getvalue().encode())
    return path


def refresh_diagnostics(folder: Path, ledger: History) -> None:
    """Write the file again if it is there, or remove it if nothing is left to tell.

    Raises:
        RunFolderError: it cannot be written.
    """
    path = folder / DIAGNOSTICS
    if not os.path.lexists(path):
        return
    if found := diagnosed(ledger):
        write_diagnostics(folder, found)
        return
    with explained(path):
        path.unlink()


def means(found: Iterable[Told]) -> dict[tuple[int, str], dict[str, float]]:
    """Return each quantity's mean over the clients that have it, by round and layer."""
    values: dict[tuple[int, str], dict[str, list[float]]] = {}
    for each in found:
        at = values.setdefault((each.round, each.layer), {})
        at.setdefault(each.quantity, []).append(each.value)
    return {
        at: {name: sum(x) / len(x) for name, x in quantities.items()}
        for at, quantities in values.items()
    }

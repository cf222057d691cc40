"""``metrics.csv``: every score of a run, for spreadsheets and plots."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from pfl_lm.federation.ledger import Ledger
from pfl_lm.files import write_atomically

COLUMNS = ("round", "client", "split", "candidate", "metric", "value")


def write_metrics(path: Path, ledger: Ledger) -> None:
    """Write all scores the ledger holds, in (round, client, split, candidate) order.

    The metric is ``nll``: nats a supervised token, weighted by tokens within a client and split.
    Behind it come, of final scores, those of `pfl_lm.evaluate.metrics` and those asked for.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for *at, value in ledger.measured():
        rows.writerow((*at, repr(value)))
    write_atomically(path, text.getvalue().encode())

"""``compare.csv``: every trial of a comparison, with every client, split and candidate."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from pfl_lm.evaluate.rates import Grid
from pfl_lm.evaluate.trials import Trial

VERSIONS = ("device", "threads", "pfl_lm", "python", "torch", "transformers", "peft", "lightning")
COLUMNS = (
    *("cell", "label", "method", "optimizer", "seed", "rate", "learning_rate", "rate_chosen"),
    *("state", "reason", "client", "split", "candidate", "own", "chosen", "nll", "rows", "tokens"),
    *("steps", "bytes_up", "bytes_down", "seconds", "failed_turns"),
    *VERSIONS,
    "digest",
)


def standings_csv(trials: Sequence[Trial], grids: Sequence[Grid]) -> str:
    """Return one row for each score of each trial, and one for a trial without scores.

    ``own`` marks the method's own candidate, ``chosen`` the client's model; losses are nats a
    supervised token.
    """
    rates = {grid.label: grid.chosen for grid in grids}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for trial in trials:
        writer.writerows(_rows(trial, trial.rate == rates.get(trial.label)))
    return text.getvalue()


def _rows(trial: Trial, rate_chosen: bool) -> Iterator[dict[str, object]]:
    about: dict[str, object] = {
        "cell": trial.name,
        "label": trial.label,
        "method": trial.method,
        "optimizer": trial.optimizer,
        "seed": trial.seed,
        "rate": trial.rate,
        "rate_chosen": _flag(rate_chosen),
        "state": trial.state,
        "reason": trial.reason,
        "digest": trial.digest,
        **{key: trial.about.get(key, "") for key in VERSIONS},
    }
    outcome = trial.outcome
    if outcome is None:
        yield about
        return
    about |= {
        "learning_rate": repr(float(outcome.learning_rate)),
        "steps": outcome.steps,
        "bytes_up": outcome.bytes_up,
        "bytes_down": outcome.bytes_down,
        "seconds": f"{outcome.seconds:.3f}",
        "failed_turns": outcome.faults,
    }
    for client, splits in outcome.scores.items():
        for split, candidates in splits.items():
            for candidate, score in candidates.items():
                yield about | {
                    "client": client,
                    "split": split,
                    "candidate": candidate,
                    "own": _flag(candidate == outcome.own),
                    "chosen": _flag(candidate == outcome.chosen[client]),
                    "nll": repr(float(score.nll)),
                    "rows": score.rows,
                    "tokens": score.tokens,
                }


def _flag(value: bool) -> str:
    return "true" if value else "false"

"""Who wins, for whom, and is it real: the trials of a comparison, set against each other.

Each method is taken at its chosen rate (rates.py), each client with the model chosen for it on its
own validation rows. Losses are of test rows; of validation rows where no client has test rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from pfl_lm.evaluate.bootstrap import LEAST_CLIENTS, Interval, paired_interval
from pfl_lm.evaluate.choice import BASE
from pfl_lm.evaluate.fairness import Spread, n_harmed, spread, win_share
from pfl_lm.evaluate.rates import Grid, choose_rate, own_validation
from pfl_lm.evaluate.trials import OVER, Outcome, Rate, Trial

Array = npt.NDArray[np.float64]
Split = Literal["test", "validation"]
LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Difference:
    """One method's loss minus another's on the same clients and seeds, nats a token.

    Attributes:
        other: the label of the method it is set against.
        verdict: what may be said, and no more.
    """

    other: str
    interval: Interval
    n_seeds: int
    n_clients: int
    verdict: str


@dataclass(frozen=True, slots=True)
class Standing:
    """One row of the table: a method at its chosen rate, over all seeds.

    Attributes:
        losses: of each client's own model, (S, C); a row of NaN for a seed that is not finished.
        ended: (S,), which seeds are over, well or not.
        own: of the method's own candidate, before any choice; the same shape.
        validation: of the clients' own models: mean over clients and finished seeds.
        spreads: one for each finished seed, and so ``harmed`` and ``harmed_by_local``.
        harmed: clients that are worse off than with the untouched backbone.
        harmed_by_local: clients that are worse off than with local training alone, same seed.
        trials: at the chosen rate, one a seed.
    """

    label: str
    method: str
    optimizer: str
    rate: Rate | None
    losses: Array
    own: Array
    ended: npt.NDArray[np.bool_]
    validation: float
    spreads: tuple[Spread, ...] = ()
    harmed: tuple[int, ...] = ()
    harmed_by_local: tuple[int, ...] = ()
    trials: tuple[Trial, ...] = ()
    against_local: Difference | None = None
    against_best: Difference | None = None

    @property
    def finished(self) -> npt.NDArray[np.bool_]:
        """Which seeds have losses, (S,)."""
        if self.losses.shape[1] == 0:
            return np.zeros_like(self.ended)
        finished: npt.NDArray[np.bool_] = self.ended & np.isfinite(self.losses).all(axis=1)
        return finished

    @property
    def failed(self) -> int:
        """How many of its seeds have diverged."""
        return sum(trial.state == "failed" for trial in self.trials)

    @property
    def outcomes(self) -> list[Outcome]:
        """What its finished runs came to."""
        return [trial.outcome for trial in self.trials if trial.outcome is not None]


@dataclass(frozen=True, slots=True)
class Standings:
    """All that a comparison says.

    Attributes:
        split: what the losses are of.
        clients: in the order of the columns of every table of losses.
        rows: scored rows of each of them.
        base: the untouched backbone; None before any trial is finished.
        methods: best first, by validation; those without a finished trial come last.
        wins: the share of (seed, client) pairs in which the first beats the second, by labels.
        local: the label of the local training that others are set against.
    """

    split: Split
    seeds: tuple[int, ...]
    clients: tuple[str, ...]
    rows: Array
    grids: tuple[Grid, ...]
    base: Standing | None
    methods: tuple[Standing, ...]
    wins: dict[tuple[str, str], float]
    local: str | None


def standings(trials: Sequence[Trial], seeds: Sequence[int]) -> Standings:
    """Set the trials of one comparison against each other; the first seed's choose the rates."""
    grids = tuple(
        choose_rate([t for t in trials if t.label == label and t.seed == seeds[0]])
        for label in dict.fromkeys(trial.label for trial in trials)
    )
    split, clients, rows = _scored(trials)
    found = [
        _standing(grid, [t for t in trials if t.label == grid.label], seeds, split, clients, rows)
        for grid in grids
    ]
    found.sort(key=lambda row: (np.isnan(row.validation), row.validation))
    local = next((row for row in found if row.method == LOCAL and row.outcomes), None)
    base = _base(trials, seeds, split, clients, rows)
    compared = [_set_against(row, found, local, base) for row in found]
    wins = {
        (row.label, other.label): win_share(row.losses[both], other.losses[both])
        for row in found
        for other in found
        if row is not other
        for both in (row.ended & other.ended,)
    }
    return Standings(
        split=split,
        seeds=tuple(seeds),
        clients=clients,
        rows=rows,
        grids=grids,
        base=base,
        methods=tuple(compared),
        wins=wins,
        local=None if local is None else local.label,
    )


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds, and their standard deviation (by n - 1); NaN if it has none."""
    if not values:
        return float("nan"), float("nan")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else np.nan


def _scored(trials: Sequence[Trial]) -> tuple[Split, tuple[str, ...], Array]:
    """Return the split that losses are of, the clients that have it, and their rows of it."""
    outcome = next((t.outcome for t in trials if t.outcome is not None), None)
    splits: tuple[Split, Split] = ("test", "validation")
    for split in splits if outcome is not None else ():
        assert outcome is not None
        scores = {c: outcome.score(c, split, BASE) for c in sorted(outcome.chosen)}
        rows = {client: score.rows for client, score in scores.items() if score is not None}
        if rows:
            return split, tuple(rows), np.array(list(rows.values()), dtype=np.float64)
    return "test", (), np.zeros(0)


def _standing(
    grid: Grid,
    trials: Sequence[Trial],
    seeds: Sequence[int],
    split: Split,
    clients: tuple[str, ...],
    rows: Array,
) -> Standing:
    kept = [trial for trial in trials if trial.rate == grid.chosen] or list(trials[:1])
    by_seed = {trial.seed: trial for trial in kept}
    outcomes = [by_seed[seed].outcome if seed in by_seed else None for seed in seeds]
    losses, own = (
        np.array([_losses(outcome, split, clients, of) for outcome in outcomes])
        for of in ("chosen", "own")
    )
    done = [outcome for outcome in outcomes if outcome is not None]
    return Standing(
        label=grid.label,
        method=trials[0].method,
        optimizer=trials[0].optimizer,
        rate=grid.chosen,
        losses=losses,
        own=own,
        ended=np.array([s in by_seed and by_seed[s].state in OVER for s in seeds]),
        validation=float(np.mean([own_validation(each) for each in done])) if done else np.nan,
        spreads=tuple(
            spread(each, rows) for each, o in zip(losses, outcomes, strict=True) if o is not None
        ),
        trials=tuple(by_seed[seed] for seed in seeds if seed in by_seed),
    )


def _losses(
    outcome: Outcome | None, split: Split, clients: tuple[str, ...], of: str
) -> list[float]:
    if outcome is None:
        return [np.nan] * len(clients)
    names = {"chosen": None, "own": outcome.own}
    scores = (outcome.score(client, split, names.get(of, of)) for client in clients)
    return [np.nan if score is None else score.nll for score in scores]


def _base(
    trials: Sequence[Trial],
    seeds: Sequence[int],
    split: Split,
    clients: tuple[str, ...],
    rows: Array,
) -> Standing | None:
    """Return the untouched backbone, as the first finished trial of each seed has scored it."""
    first: dict[int, Outcome] = {}
    for trial in trials:
        if trial.outcome is not None:
            first.setdefault(trial.seed, trial.outcome)
    if not first:
        return None
    losses = np.array([_losses(first.get(seed), split, clients, BASE) for seed in seeds])
    ended = np.array([seed in first for seed in seeds])
    validation = [
        float(np.mean(_losses(each, "validation", tuple(each.chosen), BASE)))
        for each in first.values()
    ]
    return Standing(
        label=BASE,
        method=BASE,
        optimizer="",
        rate=None,
        losses=losses,
        own=losses,
        ended=ended,
        validation=float(np.mean(validation)),
        spreads=tuple(spread(each, rows) for each in losses[ended]),
    )


def _set_against(
    row: Standing, found: Sequence[Standing], local: Standing | None, base: Standing | None
) -> Standing:
    others = [each for each in found if each.label != row.label and each.outcomes]
    whole = [each for each in others if not each.failed]
    best = next(iter(whole or others), None)  # the best by validation comes first
    floor = None if local is None or local.label == row.label else local
    return replace(
        row,
        harmed=_harmed(row, base),
        harmed_by_local=_harmed(row, local),
        against_local=difference(row, floor) if floor is not None else None,
        against_best=difference(row, best) if best is not None else None,
    )


def _harmed(row: Standing, floor: Standing | None) -> tuple[int, ...]:
    if floor is None:
        return ()
    both = row.finished & floor.finished
    return tuple(n_harmed(a, b) for a, b in zip(row.losses[both], floor.losses[both], strict=True))


def by_client(row: Standing, other: Standing) -> Array | None:
    """Return one method's loss minus another's for each client, (C,): a mean over common seeds.

    None if there is no seed that both have finished.
    """
    both = row.finished & other.finished
    if not both.any():
        return None
    differences: Array = (row.losses[both] - other.losses[both]).mean(axis=0)
    return differences


def difference(row: Standing, other: Standing) -> Difference:
    """Set one method against another, on the clients and seeds that both have finished."""
    both = row.finished & other.finished
    differences = row.losses[both] - other.losses[both]
    interval = paired_interval(differences)
    n_seeds, n_clients = differences.shape
    verdict = _verdict(row, other, interval, n_seeds, n_clients)
    return Difference(other.label, interval, n_seeds, n_clients, verdict)


def _verdict(
    row: Standing, other: Standing, interval: Interval, n_seeds: int, n_clients: int
) -> str:
    """Return what may be said: never more than the interval does."""
    for each in (row, other):
        if each.failed:
            who = "" if each is row else f"{other.label} "
            return f"{who}diverged with {each.failed} of {len(each.trials)} seeds"
    if n_seeds == 0:
        return "not run yet"
    if n_clients < LEAST_CLIENTS:
        return f"too few clients to say ({n_clients} of {LEAST_CLIENTS})"
    shown = "no difference shown"
    if interval.high < 0:
        shown = "better"
    elif interval.low > 0:
        shown = "worse"
    return f"{shown} (one seed)" if n_seeds == 1 else shown

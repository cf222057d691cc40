"""The learning rate of each method: chosen on validation, with one seed, and kept for the others.

Of the rates that did not diverge the one is chosen at which the clients' own models have the lowest
validation loss, every client counting once; of two equal ones, the first. Test rows have no say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pfl_lm.evaluate.trials import OVER, Outcome, Rate, Trial


@dataclass(frozen=True, slots=True)
class Tried:
    """One rate of a grid; ``validation`` is None unless its trial is finished."""

    rate: Rate
    state: str
    validation: float | None


@dataclass(frozen=True, slots=True)
class Grid:
    """The rates of one method, in the order asked for, and which is the best so far.

    Attributes:
        chosen: None if none is finished.
        settled: whether every trial of the grid is over.
        remark: why the choice is in doubt: it lies at an edge, or there was none to make.
    """

    label: str
    tried: tuple[Tried, ...]
    chosen: Rate | None
    settled: bool
    remark: str


def own_validation(outcome: Outcome) -> float:
    """Return the mean over clients of their own models' validation loss."""
    scores = (outcome.score(client, "validation") for client in outcome.chosen)
    losses = [score.nll for score in scores if score is not None]
    return math.fsum(losses) / len(losses)


def choose_rate(trials: Sequence[Trial]) -> Grid:
    """Choose among one method's trials with one seed."""
    tried = tuple(
        Tried(t.rate, t.state, None if t.outcome is None else own_validation(t.outcome))
        for t in trials
    )
    losses = {each.rate: each.validation for each in tried if each.validation is not None}
    chosen = min(losses, key=lambda rate: losses[rate], default=None)
    settled = all(each.state in OVER for each in tried)
    return Grid(trials[0].label, tried, chosen, settled, _remark(tried, chosen, settled))


def _remark(tried: tuple[Tried, ...], chosen: Rate | None, settled: bool) -> str:
    if chosen is None:
        return "diverged at every rate" if settled else "not known yet"
    if not settled:
        return "not all rates tried yet"
    if len(tried) == 1:
        return "one rate only, not tuned"
    numbers = [each.rate for each in tried if not isinstance(each.rate, str)]
    if len(numbers) > 1 and chosen in (min(numbers), max(numbers)):
        edge, beyond = ("lowest", "lower") if chosen == min(numbers) else ("highest", "higher")
        return f"the {edge} rate tried: a {beyond} one may be better"
    return ""

"""Which model is client i's model: chosen on its own validation rows, by a rule fixed beforehand.

The method's own candidate stands, unless another beats it by more than one paired standard error;
and the untouched backbone stands, unless the choice beats it. A client that federation did not help
keeps the backbone as it was, and is told so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pfl_lm.evaluate.scores import RowScores, paired_difference

BASE = "base"
"""The name of the untouched backbone among the candidates."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for one client, and why.

    Attributes:
        candidate: the chosen model's name.
        reason: one sentence.
        margin: its validation score minus the backbone's, nats a token; below zero is better.
        standard_error: paired standard error of the margin, nats a token.
    """

    candidate: str
    reason: str
    margin: float
    standard_error: float


def choose(validation: Mapping[str, RowScores], default: str) -> Choice:
    """Choose among candidates by their scores on the same validation rows.

    ``validation`` holds every candidate, ``base`` among them; ``default`` is the method's own.

    Raises:
        ValueError: a candidate has no finite score.
    """
    chosen, reason = default, f"the method's own model, {default}"
    best = 0.0
    for name, rows in validation.items():
        if name in (default, BASE):
            continue
        difference, error = paired_difference(rows, validation[default])
        if difference < -error and difference < best:
            chosen, best = name, difference
            reason = f"better than {default} by {-difference:.4f} ± {error:.4f} nats a token"
    margin, error = paired_difference(validation[chosen], validation[BASE])
    if margin != margin:
        raise ValueError(f"candidate {chosen!r} has no finite validation score")
    if margin >= 0 and chosen != BASE:
        doubt = f" ± {error:.4f}" if math.isfinite(error) else ""
        against = f"{chosen}: {margin:+.4f}{doubt} nats a token"
        reason = f"no candidate beat the untouched backbone ({against})"
        return Choice(BASE, reason, 0.0, 0.0)
    return Choice(chosen, reason, margin, error)

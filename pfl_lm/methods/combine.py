"""The one place where uploads become the server's next vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pfl_lm.errors import RecipeError
from pfl_lm.layout import Vector
from pfl_lm.methods.aggregate import Sent, weighted_mean
from pfl_lm.methods.robust import clipped_mean, median, trimmed_mean

if TYPE_CHECKING:
    from pfl_lm.methods.base import Setup, Upload

RELEASED = "weights"
"""The one vector of a round that ``privacy.client_level`` accounts for."""


def combine(
    setup: Setup, round: int, global_weights: Vector, uploads: Sequence[Upload], name: str
) -> Vector:
    """Return what follows ``global_weights``, by the recipe's rule, in fp32.

    With ``privacy.client_level`` it is the noised mean of clipped changes, every client alike.

    Args:
        setup: the rule, its options and the privacy lever.
        round: which round's uploads these are.
        global_weights: ``(d,)``, what the clients of these uploads were sent; left alone.
        uploads: in client-id order; may read each upload when it is asked for, and is gone through
            once or, by ``median`` and ``trimmed_mean``, several times.
        name: which vector of every upload.

    Raises:
        AggregationError: the uploads do not fit together, or are not finite.
        RecipeError: a vector that no noise is accounted for is to be averaged.
    """
    sent = Sent(uploads, name)
    how, private = setup.aggregation, setup.client_level
    if private is not None:
        if name != RELEASED:
            raise RecipeError(
                f"privacy.client_level: this method averages {name!r} beside the adapters, for "
                "which no noise is accounted for",
                hint="leave privacy.client_level out, or choose another method",
            )
        alike = ((vector, 1.0) for vector, _ in sent)
        mean = clipped_mean(alike, global_weights, private.options.clip_norm)
        return private.noised(mean, len(sent), round)
    match how.rule:
        case "mean":
            return weighted_mean(sent)
        case "clipped_mean":
            assert how.clip_norm is not None
            return clipped_mean(sent, global_weights, how.clip_norm)
        case "median":
            return median(sent)
        case "trimmed_mean":
            return trimmed_mean(sent, how.n_trimmed(len(sent)))

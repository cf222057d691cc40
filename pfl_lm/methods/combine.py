"""The one place where uploads become the server's next vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pfl_lm.layout import Vector
from pfl_lm.methods.aggregate import Sent, weighted_mean
from pfl_lm.methods.robust import clipped_mean, median, trimmed_mean

if TYPE_CHECKING:
    from pfl_lm.methods.base import Upload
    from pfl_lm.recipe import AggregationOptions


def combine(
    how: AggregationOptions, global_weights: Vector, uploads: Sequence[Upload], name: str
) -> Vector:
    """Return what follows ``global_weights``, by the recipe's rule, in fp32.

    Args:
        how: the rule and its options.
        global_weights: ``(d,)``, what the clients of these uploads were sent; left alone.
        uploads: in client-id order; may read each upload when it is asked for, and is gone through
            once or, by ``median`` and ``trimmed_mean``, several times.
        name: which vector of every upload.

    Raises:
        AggregationError: the uploads do not fit together, or are not finite.
    """
    sent = Sent(uploads, name)
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

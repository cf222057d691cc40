"""Who takes part in a round."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pfl_lm.seeds import derive_seed


def cohort(client_ids: Sequence[str], fraction: float, *, seed: int, round: int) -> list[str]:
    """Return this round's clients, in id order: at least one, drawn without replacement.

    The draw depends on the seed and the round alone.
    """
    everyone = sorted(client_ids)
    size = max(1, round_half_up(fraction * len(everyone)))
    if size >= len(everyone):
        return everyone
    draw = random.Random(derive_seed(seed, "cohort", round))
    return sorted(draw.sample(everyone, size))


def round_half_up(x: float) -> int:
    """Round to the nearest integer, halves up."""
    return int(x + 0.5)

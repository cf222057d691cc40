"""pFLAlign's mathematics on flat vectors. Torch only: no Lightning, no PEFT."""

from pfl_lm.align.moments import AlignmentState, AlignmentStep, Correction, alignment_step
from pfl_lm.align.realign import (
    correction_share,
    decayed_offset,
    offset_after_round,
    realigned_start,
)

__all__ = [
    "AlignmentState",
    "AlignmentStep",
    "Correction",
    "alignment_step",
    "correction_share",
    "decayed_offset",
    "offset_after_round",
    "realigned_start",
]

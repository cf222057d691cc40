"""A client's turn: Lightning around one adapter, and pFLAlign's two callbacks."""

from pfl_lm.train.alignment import AggregationRealignment, AlignmentTurn, GradientPreconditioner
from pfl_lm.train.local import LocalTrainer
from pfl_lm.train.module import Moments, PersonalizedLM

__all__ = [
    "AggregationRealignment",
    "AlignmentTurn",
    "GradientPreconditioner",
    "LocalTrainer",
    "Moments",
    "PersonalizedLM",
]

"""A client's turn: Lightning around one adapter, and what methods add to its steps."""

from pfl_lm.train.alignment import AggregationRealignment, AlignmentTurn, GradientPreconditioner
from pfl_lm.train.diagnostics import TurnDiagnostics
from pfl_lm.train.local import LocalTrainer
from pfl_lm.train.module import Moments, PersonalizedLM
from pfl_lm.train.terms import GradientShift, ProximalTerm

__all__ = [
    "AggregationRealignment",
    "AlignmentTurn",
    "GradientPreconditioner",
    "GradientShift",
    "LocalTrainer",
    "Moments",
    "PersonalizedLM",
    "ProximalTerm",
    "TurnDiagnostics",
]

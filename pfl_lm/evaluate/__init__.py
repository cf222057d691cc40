"""Scores per client, and the choice of each client's model."""

from pfl_lm.evaluate.choice import BASE, Choice, choose
from pfl_lm.evaluate.scores import RowScores, paired_difference, score

__all__ = ["BASE", "Choice", "RowScores", "choose", "paired_difference", "score"]

"""What a model's scores come to beside its loss: plain numbers from what scoring has seen anyway.

    perplexity       exp(Σ nll / Σ tokens)                                 language models
    token_accuracy   Σ right / Σ tokens                                    language models
    accuracy         rows whose class is the first guess / rows            classes
    macro_f1         mean over classes of 2 TP / (2 TP + FP + FN)          classes

The classes of macro-F1 are those that the rows have or that were guessed; one that is guessed and
never there counts as 0. Nothing is imported that was not there: `hugging_face.py` gives the same to
programs that speak to `evaluate`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from pfl_lm.evaluate.scores import RowScores


def metrics_of(scores: RowScores, classes: Sequence[int | None] = ()) -> dict[str, float]:
    """Return the metrics of one model on one client's rows, by name.

    Args:
        scores: of at least one row.
        classes: the number of each row's class, where rows have one.
    """
    wanted = [each for each in classes if each is not None]
    if wanted:
        return {
            "accuracy": accuracy(scores.classes, wanted),
            "macro_f1": macro_f1(scores.classes, wanted),
        }
    return {
        "perplexity": perplexity(scores.nll, scores.tokens),
        "token_accuracy": token_accuracy(scores.right, scores.tokens),
    }


def perplexity(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """Return exp of the mean nll a token; infinity where that is beyond floats."""
    try:
        return math.exp(math.fsum(nll) / sum(tokens))
    except OverflowError:
        return math.inf


def token_accuracy(right: Sequence[int], tokens: Sequence[int]) -> float:
    """Return the share of supervised tokens that are the first guess, over all rows."""
    return sum(right) / sum(tokens)


def accuracy(guesses: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    """Return the share of guesses that are right.

    Raises:
        ValueError: there is none, or there are more of one than of the other.
    """
    _check(guesses, wanted)
    return sum(guess == due for guess, due in zip(guesses, wanted, strict=True)) / len(wanted)


def macro_f1(guesses: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    """Return the mean of F1 over classes that are there or guessed; each counts alike.

    Raises:
        ValueError: there is none, or there are more of one than of the other.
    """
    _check(guesses, wanted)
    hits = Counter(due for guess, due in zip(guesses, wanted, strict=True) if guess == due)
    seen = Counter(guesses) + Counter(wanted)  # TP + FP and TP + FN, so 2 TP + FP + FN
    return math.fsum(2 * hits[each] / n for each, n in seen.items()) / len(seen)


def _check(guesses: Sequence[Hashable], wanted: Sequence[Hashable]) -> None:
    if len(guesses) != len(wanted) or not wanted:
        raise ValueError(f"{len(guesses)} guesses for {len(wanted)} rows")

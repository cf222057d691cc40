"""The project's metrics as those of Hugging Face's `evaluate`, which need no network.

Importing this imports `evaluate` and `datasets`, some seconds of a CPU where nothing else is loaded
yet: a run does so only for metrics that its recipe asks for. Make one by its class;
``keep_in_memory=True`` writes no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from pfl_lm.evaluate import metrics
from pfl_lm.evaluate.answers import exact_match, rouge_l


def _info(said: str, features: dict[str, str]) -> Any:
    kinds = {name: datasets.Value(kind) for name, kind in features.items()}
    return evaluate.MetricInfo(
        description=said, citation="", inputs_description="", features=datasets.Features(kinds)
    )


def _pairs(kind: str) -> dict[str, str]:
    return {"predictions": kind, "references": kind}


class Perplexity(evaluate.Metric):  # type: ignore[misc]
    """exp of the nll a token: ``nll`` and ``tokens`` of each row."""

    def _info(self) -> Any:
        return _info("exp(sum of nll / tokens)", {"nll": "float64", "tokens": "int64"})

    def _compute(self, nll: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
        return {"perplexity": metrics.perplexity(nll, tokens)}


class TokenAccuracy(evaluate.Metric):  # type: ignore[misc]
    """The share of tokens that are right: ``right`` and ``tokens`` of each row."""

    def _info(self) -> Any:
        return _info("right tokens / tokens", {"right": "int64", "tokens": "int64"})

    def _compute(self, right: Sequence[int], tokens: Sequence[int]) -> dict[str, float]:
        return {"token_accuracy": metrics.token_accuracy(right, tokens)}


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """The share of rows whose class is the one predicted."""

    def _info(self) -> Any:
        return _info("rows with the right class / rows", _pairs("int64"))

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": metrics.accuracy(predictions, references)}


class MacroF1(evaluate.Metric):  # type: ignore[misc]
    """The mean of F1 over classes that are there or predicted."""

    def _info(self) -> Any:
        return _info("mean of 2 TP / (2 TP + FP + FN) over classes", _pairs("int64"))

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"macro_f1": metrics.macro_f1(predictions, references)}


class ExactMatch(evaluate.Metric):  # type: ignore[misc]
    """The share of answers that are the wanted ones."""

    def _info(self) -> Any:
        return _info("answers that are the wanted ones / rows", _pairs("string"))

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"exact_match": exact_match(predictions, references)}


class RougeL(evaluate.Metric):  # type: ignore[misc]
    """The mean of F1 of the longest common subsequence of words."""

    def _info(self) -> Any:
        return _info("F1 of the longest common subsequence of words", _pairs("string"))

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"rouge_l": rouge_l(predictions, references)}


METRICS: dict[str, Any] = {
    "perplexity": Perplexity,
    "token_accuracy": TokenAccuracy,
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
    "exact_match": ExactMatch,
    "rouge_l": RougeL,
}

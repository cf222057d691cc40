"""What is measured of the final models, beside what every run measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pfl_lm.recipe.options import Options, broken

GenerationMetric = Literal["exact_match", "rouge_l"]


def _once(metrics: Sequence[str]) -> Sequence[str]:
    if len(set(metrics)) < len(metrics):
        raise broken("each metric may be named once only")
    return metrics


class EvaluationOptions(Options):
    """Metrics of answers that the final models write; they cost what writing costs."""

    metrics: Annotated[list[GenerationMetric], AfterValidator(_once)] = Field(
        default=[],
        description="Of answers that each client's model and the untouched backbone write, "
        "greedily, to its validation and test rows; see [tasks](tasks.md).",
        examples=[["rouge_l"]],
    )
    max_new_tokens: int = Field(
        default=64, ge=1, le=4096, description="The most tokens of such an answer."
    )

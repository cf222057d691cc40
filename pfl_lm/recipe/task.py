"""What a model is for: to go on with text, to tell classes apart, or to answer a text with one."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pfl_lm.recipe.options import broken
from pfl_lm.recipe.scalars import show

TaskName = Literal["causal_lm", "sequence_classification", "seq2seq_lm"]
Head = Literal["shared", "private"]

MOST_LABELS = 1000
LONGEST_LABEL = 200
"""The most classes, and the most characters in the name of one."""


@dataclass(frozen=True)
class Task:
    """A task and, of one that tells classes apart, their names in the order of their numbers."""

    name: TaskName = "causal_lm"
    labels: tuple[str, ...] = ()

    @property
    def classifies(self) -> bool:
        """Whether a row has a class, and the model a head of its own for them."""
        return self.name == "sequence_classification"

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each class by its name."""
        return {label: number for number, label in enumerate(self.labels)}


CAUSAL_LM = Task()


def label_fault(label: str) -> str | None:
    """Say why a text cannot be the name of a class, if it cannot."""
    if not label.strip():
        return "is empty"
    if len(label) > LONGEST_LABEL:
        return f"is longer than {LONGEST_LABEL} characters, for the name of a class"
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in label):
        return "holds a control character or half a surrogate pair"
    return None


def _labels(labels: list[str]) -> list[str]:
    if len(labels) < 2:
        raise broken("must name at least two classes")
    twice = [name for name, n in Counter(labels).items() if n > 1]
    if twice:
        raise broken(f"{show(twice[0])} is there twice")
    if wrong := [name for name in labels if label_fault(name)]:
        raise broken(f"{show(wrong[0])} {label_fault(wrong[0])}")
    return labels


def _as_text(labels: object) -> object:
    """Return whole numbers as text, which is how labels in the data are read."""
    if not isinstance(labels, list):
        return labels
    return [str(name) if type(name) is int else name for name in labels]


Labels = Annotated[
    list[str],
    Field(max_length=MOST_LABELS),
    BeforeValidator(_as_text, json_schema_input_type=list[str | int]),
    AfterValidator(_labels),
]

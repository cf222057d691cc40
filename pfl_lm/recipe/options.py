"""What all sections of a recipe share: strict, closed, frozen; and how a rule is broken."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

MOST = 1_000_000
"""The most of what is counted, such as rounds, steps and rows in a batch, and of scales."""

BROKEN_RULE = "broken_rule"
"""The pydantic error type of every rule of ours; its message is written for people already."""


class Options(BaseModel):
    """One section of a recipe: no unknown keys, no guessed types, no NaN, no change once made."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


def broken(reason: str, *at: str | int) -> PydanticCustomError:
    """Return the error that says why a value cannot stand.

    Args:
        reason: what is wrong and what is allowed.
        at: the key it is about, seen from where the error is raised; none if it is that very key.
    """
    return PydanticCustomError(BROKEN_RULE, "{reason}", {"reason": reason, "at": at})

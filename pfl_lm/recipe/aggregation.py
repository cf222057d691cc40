"""How uploads become the next global adapter; torch-free."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from pfl_lm.recipe.options import Options, broken

TRIM_FRACTION = 0.1
"""What ``trimmed_mean`` cuts on each side unless it is told."""

_OWNER = {"clip_norm": "clipped_mean", "trim_fraction": "trimmed_mean"}


class AggregationOptions(Options):
    """How the server makes one adapter of many; every rule but `mean` bears some bad uploads.

    What each of them bears, and what it costs clients who differ: [robustness](robustness.md).
    """

    rule: Literal["mean", "clipped_mean", "median", "trimmed_mean"] = Field(
        default="mean",
        description="mean: weighted by `method.weighting`; clipped_mean: the same, of changes w − "
        "w_g cut to `clip_norm`; median and trimmed_mean: coordinate by coordinate, every client "
        "counts alike.",
    )
    clip_norm: float | None = Field(
        default=None,
        gt=0,
        description="clipped_mean only, and needed there: the longest change w − w_g of a client, "
        "as an L2 norm over the whole adapter.",
        examples=[1.0],
    )
    trim_fraction: float | None = Field(
        default=None,
        ge=0,
        lt=0.5,
        description="trimmed_mean only, 0.1 if not set: of n uploads, the floor(trim_fraction · n) "
        "smallest and as many of the largest are left out of each coordinate.",
    )

    @field_validator(*_OWNER)
    @classmethod
    def _fits_the_rule(cls, value: float | None, info: ValidationInfo) -> float | None:
        """Refuse an option of another rule; see that a rule has its own."""
        rule, option = info.data.get("rule"), str(info.field_name)
        owner = _OWNER[option]
        if value is not None and rule not in (owner, None):  # None: the rule itself is no rule
            raise broken(f"goes with `rule: {owner}` only, not with `{rule}`")
        if value is None and rule == owner == "trimmed_mean":
            return TRIM_FRACTION
        if value is None and rule == owner:
            raise broken(
                "missing: `rule: clipped_mean` needs to know how long a change may be, for example "
                "`clip_norm: 1.0`"
            )
        return value

    def n_trimmed(self, n: int) -> int:
        """Return how many of ``n`` uploads ``trimmed_mean`` cuts on each side.

        The fraction counts as it is written: 0.29 of 100 are 29, although 0.29 * 100 is less.
        """
        return 0 if self.trim_fraction is None else floor(Fraction(repr(self.trim_fraction)) * n)

    def bears_none(self, n: int) -> str | None:
        """Return what to tell people if, of ``n`` uploads, the rule leaves out none at all."""
        told = f"aggregation.rule: with {n} upload{'' if n == 1 else 's'} a round, {self.rule} "
        if self.rule == "median" and n < 3:
            return f"{told}is their unweighted mean; it needs 3 to bear a bad one"
        if self.rule == "trimmed_mean" and self.n_trimmed(n) == 0:
            return f"{told}cuts floor({self.trim_fraction} * {n}) = 0: it is their unweighted mean"
        return None

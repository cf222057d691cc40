"""The privacy levers of a recipe: none by default, each with numbers of its own; torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pfl_lm.recipe.options import Options

_Noise = Annotated[float, Field(gt=0)]
_Delta = Annotated[float, Field(gt=0, lt=1)]


class RecordLevelOptions(Options):
    """DP-SGD on the adapter: each row's gradient is clipped, and noise is added to their sum.

    Martín Abadi et al., "Deep Learning with Differential Privacy", arXiv 1607.00133; names as in
    Opacus.
    """

    noise_multiplier: _Noise = Field(
        description="Standard deviation of the noise on the sum of a step's gradients, in units of "
        "`max_grad_norm`.",
        examples=[1.0],
    )
    max_grad_norm: float = Field(
        gt=0,
        description="Longest gradient of one row, as an L2 norm over the whole adapter; longer "
        "ones are shortened to it.",
        examples=[1.0],
    )
    delta: _Delta = Field(
        description="δ of (ε, δ)-differential privacy; should be well below 1 / train rows of the "
        "largest client.",
        examples=[1e-5],
    )


class PrivacyOptions(Options):
    """Differential privacy: nothing unless asked for. See [privacy](privacy.md)."""

    record_level: RecordLevelOptions | None = Field(
        default=None,
        description="Protects each row of a client, by noise in the client's own training.",
        examples=[{"noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-5}],
    )

    @property
    def first_asked(self) -> str | None:
        """The first lever that is set, by name; None if there is no privacy."""
        return next((name for name, lever in self if lever is not None), None)

"""Noise on what clients share: the server's mean of their clipped changes (DP-FedAvg).

McMahan et al., "Learning Differentially Private Recurrent Language Models", arXiv 1710.06963,
with a mean over so many clients as were asked:

    w_g  ←  w_g + 1/n ( Σ_k d_k min(1, C / ‖d_k‖)  +  σ C · N(0, 1)^d ),    d_k = w_k - w_g

C is ``clip_norm``, σ ``noise_multiplier``, n the uploads of the round, all of one weight. One
client more or less changes the sum by C at most; n is taken as known, since a cohort follows from
the recipe. Whatever is made of the new w_g afterwards costs no privacy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pfl_lm.layout import Vector
from pfl_lm.seeds import derive_seed

if TYPE_CHECKING:
    from pfl_lm.recipe import ClientLevelOptions, PrivacyOptions


@dataclass(frozen=True, slots=True)
class ClientLevel:
    """The client-level lever; ``secret`` is the run's, None where nothing is averaged."""

    options: ClientLevelOptions
    secret: int | None = field(repr=False)

    @classmethod
    def of(cls, privacy: PrivacyOptions, secret: int | None) -> ClientLevel | None:
        """Return the lever of a recipe; None if it is not set."""
        return None if privacy.client_level is None else cls(privacy.client_level, secret)

    def noised(self, mean: Vector, n: int, round: int) -> Vector:
        """Return a round's mean of ``n`` clipped changes with its noise, in fp32.

        The same round has the same noise: it must not be given the mean of anything else.
        """
        assert self.secret is not None
        seed = derive_seed(self.secret, "server noise", round)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(mean), generator=generator, dtype=torch.float64)
        std = self.options.noise_multiplier * self.options.clip_norm / n
        return mean.to(torch.float64).add_(noise.to(mean.device), alpha=std).to(torch.float32)

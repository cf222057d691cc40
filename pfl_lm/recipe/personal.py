"""The options of methods that end in a model for each client, beside pflalign's; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pfl_lm.recipe.averaging import Weighting
from pfl_lm.recipe.options import Options


class DittoOptions(Options):
    """Ditto: FedAvg, and beside it a model for each client that is pulled towards the shared one.

    Tian Li, Shengyuan Hu, Ahmad Beirami and Virginia Smith, "Ditto: Fair and Robust Federated
    Learning Through Personalization", arXiv 2012.04221. A turn takes twice `training`'s steps.
    """

    name: Literal["ditto"] = Field(
        description="A personal adapter for each client, pulled towards a shared one."
    )
    lam: float = Field(
        default=0.1,
        ge=0,
        description="λ, strength of the pull: (λ/2)‖v − w_g‖² is added to the personal loss; 0: "
        "the personal adapter is that of local.",
    )
    weighting: Weighting = "examples"


class FedSALoraOptions(Options):
    """FedSA-LoRA: both factors are trained, A is averaged, and B stays with its client.

    Pengxin Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
    arXiv 2410.01463.
    """

    name: Literal["fedsa_lora"] = Field(
        description="Shared A factors, and B factors of each client's own."
    )
    weighting: Weighting = "examples"

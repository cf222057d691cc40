"""The options of methods that end in one shared adapter, beside fedavg's; torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pfl_lm.recipe.options import Options

Weighting = Annotated[
    Literal["examples", "tokens", "uniform"],
    Field(description="A client's weight in averages: train rows, their supervised tokens, or 1."),
]


class FedProxOptions(Options):
    """FedProx: FedAvg whose clients are held near the shared adapter while they train.

    Tian Li et al., "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127.
    """

    name: Literal["fedprox"] = Field(
        description="One shared adapter; local training is pulled towards it."
    )
    mu: float = Field(
        default=0.01,
        ge=0,
        description="μ, strength of the pull: (μ/2)‖w − w_g‖² is added to the loss; 0: fedavg.",
    )
    weighting: Weighting = "examples"

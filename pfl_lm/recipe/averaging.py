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


class FedAvgMOptions(Options):
    """FedAvgM: FedAvg with momentum on the server.

    Tzu-Ming Harry Hsu, Hang Qi and Matthew Brown, "Measuring the Effects of Non-Identical Data
    Distribution for Federated Visual Classification", arXiv 1909.06335.
    """

    name: Literal["fedavgm"] = Field(
        description="One shared adapter; the server's steps have momentum."
    )
    server_momentum: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="β of u ← β u + D, where D is the averaged change of a round; 0: fedavg, with "
        "`server_learning_rate: 1.0`.",
    )
    server_learning_rate: float = Field(default=1.0, gt=0, description="η_s of w_g ← w_g + η_s u.")
    weighting: Weighting = "examples"


class FedAdamOptions(Options):
    """FedAdam: the averaged change of a round is the gradient of an Adam on the server.

    Sashank J. Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295.
    """

    name: Literal["fedadam"] = Field(
        description="One shared adapter; the server's steps are Adam's."
    )
    server_learning_rate: float = Field(
        default=1e-3,
        gt=0,
        description="η_s, about how far a coordinate of the shared adapter moves in a round.",
    )
    beta_1: float = Field(
        default=0.9, ge=0, lt=1, description="β₁, decay of the mean m of the averaged changes D."
    )
    beta_2: float = Field(default=0.99, ge=0, lt=1, description="β₂, decay of the mean v of D².")
    tau: float = Field(
        default=1e-3,
        gt=0,
        description="τ, added to √v: changes that are much smaller count by their size, larger "
        "ones by their sign.",
    )
    weighting: Weighting = "examples"


class ScaffoldOptions(Options):
    """SCAFFOLD: local steps corrected for the drift of each client, with plain SGD only.

    Sai Praneeth Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated
    Learning", arXiv 1910.06378. As in the paper all clients count alike.
    """

    name: Literal["scaffold"] = Field(
        description="One shared adapter; each client's gradients are corrected for its drift."
    )
    server_learning_rate: float = Field(
        default=1.0,
        gt=0,
        description="η_g of w_g ← w_g + η_g D, where D is the averaged change of a round.",
    )


class FFALoraOptions(Options):
    """FFA-LoRA: A stays as it was drawn, B alone is trained, sent and averaged, and exactly so.

    Youbang Sun, Zitao Li, Yaliang Li and Bolin Ding, "Improving LoRA in Privacy-preserving
    Federated Learning", arXiv 2403.12313.
    """

    name: Literal["ffa_lora"] = Field(
        description="One shared adapter whose A factors never change; only B travels."
    )
    weighting: Weighting = "examples"


class RoLoraOptions(Options):
    """RoLoRA: B in odd rounds and A in even ones is trained, sent and averaged, exactly so.

    Shuangyi Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of
    LoRA", arXiv 2502.01755.
    """

    name: Literal["rolora"] = Field(
        description="One shared adapter; its B and A factors take turns, round by round."
    )
    weighting: Weighting = "examples"

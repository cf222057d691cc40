"""The options of methods whose clients' adapters may differ in rank and modules; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pfl_lm.recipe.averaging import Weighting
from pfl_lm.recipe.options import Options


class FlexLoraOptions(Options):
    """FlexLoRA: the products B A are averaged, and each client gets the best of its own rank.

    Jiamu Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
    Client Resources", arXiv 2402.11505.
    """

    name: Literal["flexlora"] = Field(
        description="One shared update, averaged as it acts and cut to each client's rank by an "
        "SVD."
    )
    weighting: Weighting = "examples"


class HetLoraOptions(Options):
    """HetLoRA: adapters of several ranks, filled up with zeros to be averaged, cut to be sent.

    Yae Jee Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
    Models", arXiv 2401.06432, without its pruning of ranks while training.
    """

    name: Literal["hetlora"] = Field(
        description="One shared adapter of the largest rank, of which each client has the first "
        "rows and columns."
    )
    weighting: Literal["sparsity", "examples", "tokens", "uniform"] = Field(
        default="sparsity",
        description="A client's weight in averages: ‖B A‖ of its adapter, train rows, their "
        "supervised tokens, or 1.",
    )

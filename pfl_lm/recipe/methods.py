"""The options of every method, told apart by ``method.name``; torch-free."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pfl_lm.recipe.averaging import (
    FedAdamOptions,
    FedAvgMOptions,
    FedProxOptions,
    FFALoraOptions,
    RoLoraOptions,
    ScaffoldOptions,
    Weighting,
)
from pfl_lm.recipe.mixed import FlexLoraOptions, HetLoraOptions
from pfl_lm.recipe.options import Options, broken
from pfl_lm.recipe.personal import (
    DittoOptions,
    FedSALoraOptions,
)
from pfl_lm.recipe.scalars import show

_NO_START = {"personalized_start": False, "correction": "none"}
PRESETS: dict[str, dict[str, object]] = {
    "paper": {"eps": 1e-12},
    "no_preconditioner": {"preconditioner": False},
    "no_correction": {"correction": "none"},
    "half_correction": {"correction": "half"},
    "full_correction": {"correction": "full"},
    "hard_correction": {"correction": "hard"},
    "no_realignment": _NO_START,
    "sgd": {"preconditioner": False, **_NO_START},
}
"""pFLAlign's named settings: as published, and its ablations."""


class PFLAlignOptions(Options):
    """pFLAlign: precondition the local gradient, realign each client's offset after averaging.

    Dongwon Kim and Gyuejeong Lee, "Personalized Federated Learning for Gradient Alignment",
    arXiv 2605.02143. The defaults are Algorithm 1 with ε = 0.
    """

    name: Literal["pflalign"] = Field(
        description="Personalized offsets, aligned with the gradient."
    )
    preset: (
        Literal[
            "paper",
            "no_preconditioner",
            "no_correction",
            "half_correction",
            "full_correction",
            "hard_correction",
            "no_realignment",
            "sgd",
        ]
        | None
    ) = Field(
        default=None,
        description="A named setting of the switches below: as published (paper), or an ablation.",
    )
    beta: float = Field(
        default=0.9,
        gt=0,
        lt=1,
        description="β, decay of the running means m and v, per optimizer step.",
    )
    eps: float = Field(
        default=0.0,
        ge=0,
        description="ε, added to v and 2σ²; 0 keeps the method free of the loss's scale, "
        "1e-12 is the published value.",
    )
    preconditioner: bool = Field(
        default=True,
        description="Scale each coordinate by P, its signal-to-noise ratio; false: P = 1.",
    )
    correction: Literal["erf", "none", "half", "full", "hard"] = Field(
        default="erf",
        description="γ, the share of the offset Δ taken back over a round: erf (by the gradient's "
        "probability to oppose Δ), none (0), half (½), full (1), hard (0 or 1 by sign).",
    )
    personalized_start: bool = Field(
        default=True,
        description="Start a round from the global adapter plus the client's offset Δ; false: from "
        "the global adapter alone.",
    )
    precondition_target: Literal["gradient", "update"] = Field(
        default="gradient",
        description="What P scales: the gradient (published, with SGD) or the optimizer's update.",
    )
    update_scale: Literal["none", "per_matrix", "match"] = Field(
        default="none",
        description="Rescale the preconditioned step within each LoRA matrix: none, per_matrix (to "
        "root mean square 1) or match (to that of the base optimizer's own update).",
    )

    offset_reference: Literal["pre", "post"] = Field(
        default="pre",
        description="What Δ is measured from: pre, the w_g its round started from; post, the w_g "
        "the next turn receives, so that a client starts where it ended.",
    )
    stale_offset: Literal["keep", "decay"] = Field(
        default="keep",
        description="Δ of a client that missed k rounds: keep it as it is, or decay, Δ⊙(1-Γ)^k "
        "with Γ the mean of γ over its last turn.",
    )
    weighting: Weighting = "examples"

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, data: object) -> object:
        """Set what the preset means; a switch that says otherwise is an error, not a mixture."""
        if not isinstance(data, dict) or not isinstance(data.get("preset"), str):
            return data
        meant = PRESETS.get(data["preset"], {})
        for key, value in meant.items():
            if key in data and data[key] != value:
                raise broken(f"`preset: {data['preset']}` sets it to {show(value)}", key)
        return {**data, **meant}

    @model_validator(mode="after")
    def _start_fits_offset(self) -> Self:
        if self.offset_reference == "post" and not self.personalized_start:
            raise broken(
                "post starts each client where it ended, which `personalized_start: false` forbids",
                "offset_reference",
            )
        return self

    @model_validator(mode="after")
    def _something_decays(self) -> Self:
        if self.stale_offset == "decay" and self.offset_reference == "post":
            raise broken(
                "decay shrinks a kept offset, and with `offset_reference: post` none is kept: a "
                "client starts where it ended, however long ago",
                "stale_offset",
            )
        if self.stale_offset == "decay" and self.correction == "none":
            raise broken(
                "decay goes by the share Γ that corrections take off the offset, and "
                "`correction: none` takes none: nothing would ever decay",
                "stale_offset",
            )
        return self

    @model_validator(mode="after")
    def _start_fits_correction(self) -> Self:
        if not self.personalized_start and self.correction != "none":
            raise broken(
                "false needs `method.correction: none`, "
                "otherwise every round would move the global adapter by -Γ⊙Δ",
                "personalized_start",
            )
        return self


class FedAvgOptions(Options):
    """FedAvg: average the clients' adapters, weighted by their training examples.

    H. Brendan McMahan et al., "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", arXiv 1602.05629.
    """

    name: Literal["fedavg"] = Field(description="One shared adapter, averaged every round.")
    weighting: Weighting = "examples"


class LocalOptions(Options):
    """Local: every client trains alone and nothing is averaged; the floor to compare with."""

    name: Literal["local"] = Field(description="One adapter per client, nothing shared.")


MethodOptions = Annotated[
    PFLAlignOptions
    | FedAvgOptions
    | FedProxOptions
    | FedAvgMOptions
    | FedAdamOptions
    | ScaffoldOptions
    | DittoOptions
    | FFALoraOptions
    | FedSALoraOptions
    | RoLoraOptions
    | FlexLoraOptions
    | HetLoraOptions
    | LocalOptions,
    Field(discriminator="name"),
]

METHOD_OPTIONS: dict[str, type[Options]] = {
    "pflalign": PFLAlignOptions,
    "fedavg": FedAvgOptions,
    "fedprox": FedProxOptions,
    "fedavgm": FedAvgMOptions,
    "fedadam": FedAdamOptions,
    "scaffold": ScaffoldOptions,
    "ditto": DittoOptions,
    "ffa_lora": FFALoraOptions,
    "fedsa_lora": FedSALoraOptions,
    "rolora": RoLoraOptions,
    "flexlora": FlexLoraOptions,
    "hetlora": HetLoraOptions,
    "local": LocalOptions,
}

MIXES_RANKS = ("local", "flexlora", "hetlora")
"""Methods whose clients' adapters may differ in rank and modules."""

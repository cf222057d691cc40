"""The recipe: what a run is, section by section. Every default and every rule is stated here."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from pfl_lm.recipe.aggregation import AggregationOptions
from pfl_lm.recipe.averaging import ScaffoldOptions
from pfl_lm.recipe.compared import CompareOptions
from pfl_lm.recipe.data import DataOptions
from pfl_lm.recipe.methods import LocalOptions, MethodOptions, PFLAlignOptions
from pfl_lm.recipe.options import Options, broken
from pfl_lm.recipe.privacy import PrivacyOptions, uncovered
from pfl_lm.recipe.sections import (
    AdapterOptions,
    BackboneOptions,
    FederationOptions,
    RunName,
    RuntimeOptions,
    TrainingOptions,
)

__all__ = [
    "AdapterOptions",
    "AggregationOptions",
    "BackboneOptions",
    "DataOptions",
    "FederationOptions",
    "PrivacyOptions",
    "Recipe",
    "RuntimeOptions",
    "TrainingOptions",
    "json_schema",
]


class Recipe(Options):
    """One federated fine-tuning run: a backbone, its adapters, the clients' data and a method."""

    name: RunName = Field(
        description="Name of the run and of its folder: letters, digits, `.`, `_`, `-`.",
        examples=["quickstart"],
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**63 - 1,
        description="Seed from which every other seed is derived by hashing.",
    )
    backbone: BackboneOptions = Field(
        description="The frozen language model.",
        examples=[{"model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}],
    )
    adapter: AdapterOptions = Field(
        default_factory=AdapterOptions,
        description="The LoRA adapter that each client trains.",
        examples=[{"r": 8}],
    )
    data: DataOptions = Field(
        description="The clients' examples.", examples=[{"path": "clients.jsonl"}]
    )
    federation: FederationOptions = Field(
        description="Rounds and cohorts.", examples=[{"rounds": 3}]
    )
    training: TrainingOptions = Field(
        description="What a client does within one round.",
        examples=[{"learning_rate": 0.002, "max_steps": 4}],
    )
    method: MethodOptions = Field(
        description="How the clients' adapters are personalized and averaged.",
        examples=[{"name": "pflalign"}],
    )
    aggregation: AggregationOptions = Field(
        default_factory=AggregationOptions,
        description="What the server makes of the clients' uploads.",
        examples=[{"rule": "median"}],
    )
    privacy: PrivacyOptions = Field(
        default_factory=PrivacyOptions,
        description="Differential privacy: nothing unless asked for.",
        examples=[{"record_level": "{noise_multiplier: 1.0, max_grad_norm: 1.0, delta: 1e-5}"}],
    )
    runtime: RuntimeOptions = Field(
        default_factory=RuntimeOptions,
        description="Where the run is written and what it may use.",
        examples=[{"output_dir": "runs"}],
    )
    compare: CompareOptions | None = Field(
        default=None,
        description="What `pfl-lm compare` compares; a run of its own passes it over.",
        examples=[{"methods": "[pflalign, fedavg]"}],
    )

    @model_validator(mode="after")
    def _choose_optimizer(self) -> Self:
        """Fill in ``training.optimizer``, or refuse one that undoes the method."""
        on_gradient = (
            isinstance(self.method, PFLAlignOptions)
            and self.method.precondition_target == "gradient"
        )
        scaffold = isinstance(self.method, ScaffoldOptions)
        if self.training.optimizer is None:
            chosen = {"optimizer": "sgd" if on_gradient or scaffold else "adamw"}
            training = self.training.model_copy(update=chosen)
            object.__setattr__(self, "training", training)  # frozen for everybody else
        elif self.training.optimizer == "adamw" and on_gradient:
            raise broken(
                "AdamW normalises a per-coordinate factor on the gradient away, so pflalign's "
                "preconditioner would do nothing; set `method.precondition_target: update` or "
                "`training.optimizer: sgd`",
                "training",
                "optimizer",
            )
        elif self.training.optimizer == "adamw" and scaffold:
            raise broken(
                "scaffold takes (w_g − w) / (T η) for a mean of gradients, which it is with plain "
                "SGD only; write `sgd`, or leave it out",
                "training",
                "optimizer",
            )
        return self

    @model_validator(mode="after")
    def _auto_is_for_the_gradient(self) -> Self:
        if self.training.rate_is_auto and not (
            isinstance(self.method, PFLAlignOptions)
            and self.method.precondition_target == "gradient"
            and self.method.update_scale == "none"
            and self.method.preconditioner
        ):
            raise broken(
                "auto is for pflalign's preconditioned gradient (`precondition_target: gradient`, "
                "`update_scale: none`); here give a number, for AdamW for example 0.002",
                "training",
                "learning_rate",
            )
        return self

    @model_validator(mode="after")
    def _a_rule_has_something_to_average(self) -> Self:
        if isinstance(self.method, LocalOptions) and self.aggregation.rule != "mean":
            raise broken(
                "`local` sends nothing to the server, so no rule has anything to work on; "
                "leave `aggregation` out, or choose another method",
                "aggregation",
                "rule",
            )
        if isinstance(self.method, ScaffoldOptions) and self.aggregation.rule != "mean":
            raise broken(
                "scaffold's corrections hold only while the server's control variate is the plain "
                f"mean of the clients', which `{self.aggregation.rule}` would not keep; leave "
                "`aggregation` out, or choose another method",
                "aggregation",
                "rule",
            )
        return self

    @model_validator(mode="after")
    def _privacy_covers_what_is_done(self) -> Self:
        wrong = uncovered(
            self.privacy, self.data, self.training, self.method, self.aggregation, self.runtime
        )
        if wrong is not None:
            raise wrong
        return self

    def run_options(self) -> dict[str, Any]:
        """Return every key that a run of this recipe goes by, with its value: all but `compare`."""
        return self.model_dump(mode="python", exclude={"compare"})


def json_schema() -> dict[str, Any]:
    """Return the recipe's JSON Schema, for editors and for the reference page."""
    return Recipe.model_json_schema()

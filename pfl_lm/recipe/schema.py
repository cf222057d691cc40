"""The recipe: what a run is, section by section. Every default and every rule is stated here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from pfl_lm.recipe.aggregation import AggregationOptions
from pfl_lm.recipe.averaging import ScaffoldOptions
from pfl_lm.recipe.clients import ClientRules, misfit
from pfl_lm.recipe.compared import CompareOptions
from pfl_lm.recipe.data import DataOptions
from pfl_lm.recipe.evaluation import EvaluationOptions
from pfl_lm.recipe.fitting import fitted_to_task
from pfl_lm.recipe.kinds import RunName
from pfl_lm.recipe.methods import (
    MIXES_RANKS,
    LocalOptions,
    MethodOptions,
    PFLAlignOptions,
)
from pfl_lm.recipe.mixed import FlexLoraOptions, HetLoraOptions
from pfl_lm.recipe.options import Options, broken
from pfl_lm.recipe.own import Own, largest_adapter, own_of
from pfl_lm.recipe.privacy import PrivacyOptions, uncovered
from pfl_lm.recipe.sections import (
    AdapterOptions,
    BackboneOptions,
    FederationOptions,
    RuntimeOptions,
    TrainingOptions,
)
from pfl_lm.recipe.task import Task, TaskName

__all__ = [
    "AdapterOptions",
    "AggregationOptions",
    "BackboneOptions",
    "DataOptions",
    "EvaluationOptions",
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
    task: TaskName = Field(
        default="causal_lm",
        description="What is learnt: causal_lm: to go on with text; sequence_classification: which "
        "class a text is of; seq2seq_lm: to answer a text by an encoder and a decoder; see "
        "[tasks](tasks.md).",
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
    clients: ClientRules = Field(
        default=[],
        description="What is otherwise for some clients: rules, each for those that it matches.",
        examples=["[{match: {ids: [alice]}, max_steps: 8}]"],
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
    evaluation: EvaluationOptions = Field(
        default_factory=EvaluationOptions,
        description="What is measured of the final models beside their loss.",
        examples=[{"metrics": "[rouge_l]"}],
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
    def _fit_to_task(self) -> Self:
        """Fill in what follows from the task, or refuse what does not go with it."""
        for name, section in fitted_to_task(self).items():
            object.__setattr__(self, name, section)  # frozen for everybody else
        return self

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
        if (
            isinstance(self.method, FlexLoraOptions | HetLoraOptions)
            and self.aggregation.rule != "mean"
        ):
            raise broken(
                f"{self.method.name} averages in its own way, what clients of unlike ranks have "
                f"sent, so `{self.aggregation.rule}` cannot be used; leave `aggregation` out, or "
                "choose another method",
                "aggregation",
                "rule",
            )
        return self

    @model_validator(mode="after")
    def _rules_fit(self) -> Self:
        wrong = misfit(
            self.clients,
            self.training,
            self.method.name,
            MIXES_RANKS,
            diagnostics=self.runtime.diagnostics,
        )
        if wrong is not None:
            raise wrong
        return self

    @model_validator(mode="after")
    def _privacy_covers_what_is_done(self) -> Self:
        wrong = uncovered(
            self.privacy,
            self.data,
            self.training,
            self.method,
            self.aggregation,
            self.runtime,
            self.backbone,
        )
        if wrong is not None:
            raise wrong
        return self

    @model_validator(mode="after")
    def _spread_by_one_process(self) -> Self:
        if self.backbone.device_map is None:
            return self
        if self.runtime.parallel == "clients":
            raise broken(
                "auto spreads one backbone over all GPUs, and `runtime.parallel: clients` wants "
                "one for each process; leave one of them out",
                *("backbone", "device_map"),
            )
        if self.runtime.compile:
            raise broken(
                "with `backbone.device_map` the layers are called through Accelerate, which moves "
                "what they are given, and are not compiled; leave it out",
                *("runtime", "compile"),
            )
        if self.privacy.record_level is not None:
            raise broken(
                "with `privacy.record_level` each row's gradient is needed on one device; leave "
                "it out",
                *("backbone", "device_map"),
            )
        return self

    @model_validator(mode="after")
    def _compiled_or_run_twice(self) -> Self:
        if self.runtime.compile and self.training.gradient_checkpointing:
            raise broken(
                "a compiled layer cannot be run once more with the same dropout, as "
                "`training.gradient_checkpointing` needs it; leave one of them out",
                *("runtime", "compile"),
            )
        return self

    def own(self, client: str, n_rows: int) -> Own:
        """Return what a client with so many train rows goes by: ``clients``' rules filled in."""
        length = self.data.max_length
        return own_of(self.clients, self.training, self.adapter, length, client, n_rows)

    def own_differences(self, client: str, n_rows: int) -> str:
        """Return in what a client differs from one whom no rule is for, in words."""
        nobody = own_of((), self.training, self.adapter, self.data.max_length, client, n_rows)
        return self.own(client, n_rows).differences(nobody)

    def own_lengths(self, n_rows: Mapping[str, int]) -> dict[str, int]:
        """Return the longest example of the clients, with their train rows, who have their own."""
        lengths = {client: self.own(client, n).max_length for client, n in n_rows.items()}
        return {client: n for client, n in lengths.items() if n != self.data.max_length}

    @property
    def mixes_ranks(self) -> bool:
        """Whether some clients' adapters may be smaller than others'."""
        return any(rule.r is not None or rule.target_modules is not None for rule in self.clients)

    @property
    def largest_adapter(self) -> AdapterOptions:
        """The adapter that has room for every client's."""
        return largest_adapter(self.clients, self.adapter)

    def task_for(self, labels: Iterable[str] = ()) -> Task:
        """Return the task; ``labels`` are those of the data, where the recipe lists none."""
        if self.task != "sequence_classification":
            return Task(self.task)
        return Task(self.task, tuple(labels if self.data.labels is None else self.data.labels))

    def run_options(self) -> dict[str, Any]:
        """Return every key that a run of this recipe goes by, with its value: all but `compare`."""
        return self.model_dump(mode="python", exclude={"compare"})


def json_schema() -> dict[str, Any]:
    """Return the recipe's JSON Schema, for editors and for the reference page."""
    return Recipe.model_json_schema()

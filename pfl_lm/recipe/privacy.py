"""The privacy levers of a recipe: none by default, each with numbers of its own; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from pydantic_core import PydanticCustomError

from pfl_lm.recipe.aggregation import AggregationOptions
from pfl_lm.recipe.averaging import ScaffoldOptions
from pfl_lm.recipe.data import DataOptions
from pfl_lm.recipe.methods import LocalOptions, MethodOptions
from pfl_lm.recipe.mixed import FlexLoraOptions, HetLoraOptions
from pfl_lm.recipe.options import Options, broken
from pfl_lm.recipe.sections import BackboneOptions, RuntimeOptions, TrainingOptions

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


class ClientLevelOptions(Options):
    """Noise on the server's mean: each client's change w − w_g is clipped, all count alike.

    H. Brendan McMahan et al., "Learning Differentially Private Recurrent Language Models",
    arXiv 1710.06963.
    """

    noise_multiplier: _Noise = Field(
        description="Standard deviation of the noise on the sum of a round's changes, in units of "
        "`clip_norm`.",
        examples=[1.0],
    )
    clip_norm: float = Field(
        gt=0,
        description="Longest change w − w_g of one client in one round, as an L2 norm over the "
        "whole adapter; longer ones are shortened to it.",
        examples=[1.0],
    )
    delta: _Delta = Field(
        description="δ of (ε, δ)-differential privacy; should be well below 1 / clients.",
        examples=[1e-5],
    )


class PrivacyOptions(Options):
    """Differential privacy: nothing unless asked for. See [privacy](privacy.md)."""

    record_level: RecordLevelOptions | None = Field(
        default=None,
        description="Protects each row of a client, by noise in the client's own training.",
        examples=[{"noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-5}],
    )

    client_level: ClientLevelOptions | None = Field(
        default=None,
        description="Protects each client's whole share in what the others get to see, by noise "
        "that the server adds; the server itself is trusted.",
        examples=[{"noise_multiplier": 1.0, "clip_norm": 1.0, "delta": 1e-5}],
    )

    @property
    def first_asked(self) -> str | None:
        """The first lever that is set, by name; None if there is no privacy."""
        return next((name for name, lever in self if lever is not None), None)


def loose_deltas(privacy: PrivacyOptions, n_train: Mapping[str, int]) -> list[str]:
    """Return what to tell a person whose δ bounds nothing; ``n_train`` are each client's rows."""
    client = max(n_train, key=lambda each: n_train[each])
    record, level = privacy.record_level, privacy.client_level
    told = []
    if record is not None and record.delta * n_train[client] >= 1:
        told.append(_loose("record_level", record.delta, n_train[client], f"rows of {client}"))
    if level is not None and level.delta * len(n_train) >= 1:
        told.append(_loose("client_level", level.delta, len(n_train), "clients"))
    return told


def _loose(lever: str, delta: float, n: int, of: str) -> str:
    return (
        f"privacy.{lever}.delta: {delta:g} is not below 1 / {n}, one of {n} {of}, so that one may "
        f"be told outright; take {0.1 / n:.1g} or less"
    )


def uncovered(
    privacy: PrivacyOptions,
    data: DataOptions,
    training: TrainingOptions,
    method: MethodOptions,
    aggregation: AggregationOptions,
    runtime: RuntimeOptions,
    backbone: BackboneOptions,
) -> PydanticCustomError | None:
    """Return what of a recipe its levers do not account for or cannot go with; None if nothing."""
    lever = privacy.first_asked
    weighting = getattr(method, "weighting", "uniform")
    if privacy.record_level is not None and data.group_by_length:
        return broken(
            "with `privacy.record_level` chance alone draws the rows of a step, or they would not "
            "be protected as accounted for; leave it out",
            *("data", "group_by_length"),
        )
    if privacy.record_level is not None and runtime.compile:
        return broken(
            "with `privacy.record_level` each row's gradient is looked at inside of the layers, "
            "and a compiled one shows nothing; leave it out",
            *("runtime", "compile"),
        )
    if privacy.record_level is not None and backbone.dtype == "float16":
        return broken(
            "float16 has gradients scaled and steps left out by what the rows' gradients are, "
            "which `privacy.record_level` does not account for; use `bfloat16` or `float32`",
            *("backbone", "dtype"),
        )
    if privacy.record_level is not None and training.gradient_checkpointing:
        return broken(
            "with `privacy.record_level` each row's gradient is looked at inside of the layers, "
            "which would run twice; leave it out",
            *("training", "gradient_checkpointing"),
        )
    if lever is not None and training.rate_is_auto:
        return broken(
            f"auto looks at clients' gradients and losses, which `privacy.{lever}` does not cover; "
            "give a number",
            *("training", "learning_rate"),
        )
    if privacy.record_level is not None and weighting == "tokens":
        return broken(
            "tokens would tell how long a client's rows are, which `privacy.record_level` does not "
            "cover; use `examples` or `uniform`",
            *("method", "weighting"),
        )
    if privacy.record_level is not None and runtime.diagnostics:
        return broken(
            "true would tell of gradients and offsets more than `privacy.record_level` accounts "
            "for; leave it out",
            *("runtime", "diagnostics"),
        )
    if privacy.client_level is None:
        return None
    if isinstance(method, LocalOptions):
        return broken(
            "`local` sends nothing to the server, so there is nothing to protect; leave it out",
            *("privacy", "client_level"),
        )
    if isinstance(method, ScaffoldOptions):
        return broken(
            "scaffold's server makes a control variate of the uploads too, for which no noise is "
            "accounted for; leave it out, or choose another method",
            *("privacy", "client_level"),
        )
    if isinstance(method, FlexLoraOptions | HetLoraOptions):
        return broken(
            f"{method.name} does not average changes w − w_g, for whose length alone noise is "
            "accounted for; leave it out, or choose another method",
            *("privacy", "client_level"),
        )
    if aggregation.rule != "mean":
        return broken(
            f"`privacy.client_level` clips and averages in its own way, so `{aggregation.rule}` "
            "cannot be used; use `mean`",
            *("aggregation", "rule"),
        )
    if weighting != "uniform":
        return broken(
            f"`privacy.client_level` needs all clients to count alike, which by `{weighting}` they "
            "do not; write `weighting: uniform`",
            *("method", "weighting"),
        )
    return None

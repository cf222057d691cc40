"""Did you mean: from a key that does not exist to the one that was probably meant."""

from __future__ import annotations

from functools import cache
from typing import get_args, get_origin

from pfl_lm.recipe.clients import ClientMatch, ClientRule
from pfl_lm.recipe.compared import ComparedMethod, ComparedTraining
from pfl_lm.recipe.methods import METHOD_OPTIONS
from pfl_lm.recipe.nearest import nearest
from pfl_lm.recipe.options import Options
from pfl_lm.recipe.schema import Recipe

_SYNONYMS = {
    "adapter": ("lora", "peft", "adapters"),
    "adapter.r": ("rank", "lora_r", "lora_rank"),
    "adapter.lora_alpha": ("alpha",),
    "adapter.lora_dropout": ("dropout",),
    "adapter.target_modules": ("modules", "targets", "target", "lora_target_modules"),
    "adapter.layers_to_transform": ("layers",),
    "aggregation": ("aggregator", "aggregate", "robust", "robust_aggregation"),
    "aggregation.clip_norm": ("clip", "norm_bound", "clipping_norm", "clip_threshold"),
    "aggregation.rule": ("aggregation_rule",),
    "aggregation.trim_fraction": ("trim", "trim_ratio", "trimmed_fraction", "cut_fraction"),
    "backbone.model_name_or_path": ("model", "model_name", "base_model", "model_id", "checkpoint"),
    "backbone.gguf_file": ("gguf",),
    "backbone.dtype": ("torch_dtype", "precision"),
    "backbone.quantization": ("load_in_4bit", "load_in_8bit", "quantize", "bits", "qlora"),
    "clients": ("client_overrides", "overrides", "per_client"),
    "data": ("datasets",),
    "data.path": ("file", "data_path", "data_files", "train_file"),
    "data.dataset_name": ("dataset", "dataset_id", "hub_id", "repo_id"),
    "data.dataset_config_name": ("subset", "dataset_config", "config_name", "config"),
    "data.dataset_train_split": ("train_split", "train_split_name"),
    "data.dataset_validation_split": ("eval_split", "validation_split_name", "dev_split"),
    "data.dataset_test_split": ("test_split", "test_split_name"),
    "data.revision": ("dataset_revision", "data_revision"),
    "data.data_file": ("package_file", "json_file"),
    "data.format": ("data_format", "dataset_format", "dataset_type"),
    "data.columns": ("rename", "rename_columns", "column_mapping", "field_names"),
    "data.partition": ("partitioner", "partitioning", "heterogeneity", "split_clients"),
    "data.min_train_samples": ("min_samples", "min_rows", "min_examples_per_client"),
    "data.max_train_samples": ("max_samples", "max_rows", "max_examples_per_client", "cap"),
    "data.holdout_clients": ("held_out_clients", "unseen_clients", "test_clients"),
    "data.on_long": ("truncation", "long_rows", "excess_length_strategy", "overflow"),
    "data.client_column": ("client", "client_id", "client_key"),
    "data.split_column": ("split",),
    "data.group_column": ("group", "groups", "group_by", "document_column"),
    "data.validation_fraction": ("val_fraction", "validation_split", "val_size", "eval_fraction"),
    "data.max_length": ("seq_len", "max_seq_length", "max_seq_len", "cutoff_len", "sequence_len"),
    "federation": ("fl", "federated", "server"),
    "federation.rounds": ("num_rounds", "n_rounds", "num_server_rounds"),
    "federation.fraction_train": ("fraction", "client_fraction", "fraction_fit", "participation"),
    "federation.clients_per_round": ("cohort_size", "n_clients_per_round", "num_clients"),
    "federation.availability": ("trace", "availability_trace"),
    "federation.min_clients": ("min_available_nodes", "min_train_nodes", "min_available_clients"),
    "method": ("algorithm", "strategy"),
    "method.server_learning_rate": ("server_lr", "eta_s", "global_lr", "eta_g"),
    "method.lam": ("lambda", "lambda_", "ditto_lambda", "lamda"),
    "method.mu": ("proximal_mu", "prox_mu", "proximal_weight"),
    "privacy": ("dp", "differential_privacy"),
    "privacy.client_level": ("user_level", "client_dp", "dp_fedavg"),
    "privacy.record_level": ("dp_sgd", "dpsgd", "example_level", "sample_level", "row_level"),
    "runtime.output_dir": ("output", "out", "run_dir", "output_folder"),
    "runtime.threads": ("num_threads", "n_threads", "cores"),
    "runtime.diagnostics": ("diagnose", "diagnostic", "diagnosis"),
    "runtime.compile": ("torch_compile", "compiled", "use_torch_compile"),
    "runtime.tracking": ("tracker", "report_to", "logger", "tensorboard"),
    "training": ("train", "trainer"),
    "training.learning_rate": ("lr", "eta"),
    "training.max_steps": ("steps", "local_steps"),
    "training.local_epochs": ("epochs", "num_train_epochs"),
    "training.per_device_train_batch_size": ("batch_size", "train_batch_size", "micro_batch_size"),
    "training.per_device_eval_batch_size": ("eval_batch_size",),
    "training.gradient_accumulation_steps": ("grad_accum", "accumulation", "accumulation_steps"),
    "training.gradient_checkpointing": ("activation_checkpointing", "grad_checkpointing"),
    "training.optimizer": ("optim", "optimiser"),
}
_MEANT = {word: key for key, words in _SYNONYMS.items() for word in words}


IN_LISTS: dict[str, type[Options]] = {
    "compare.methods[]": ComparedMethod,
    "compare.methods[].training": ComparedTraining,
    "clients[]": ClientRule,
    "clients[].match": ClientMatch,
}
"""Sections within the items of a list, which ``[]`` stands for."""


def section_class(section: str, method: str | None = None) -> type[Options] | None:
    """Return the options class of a section, dotted if within another; ``""`` is the recipe."""
    if section == "":
        return Recipe
    if section in IN_LISTS:
        return IN_LISTS[section]
    if section == "method":
        return METHOD_OPTIONS.get(method or "")
    above, _, name = section.rpartition(".")
    options = section_class(above, method)
    field = options.model_fields.get(name) if options else None
    if field is None or get_origin(field.annotation) is list:
        return None
    kinds = (field.annotation, *get_args(field.annotation))
    classes = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Options))
    return next(classes, None)


def subsections(section: str) -> dict[str, type[Options]]:
    """Return the sections within a section, by their dotted names."""
    options = section_class(section)
    inner = [f"{section}.{key}" for key in (options.model_fields if options else ())]
    inner += [name for name in IN_LISTS if name.startswith((f"{section}.", f"{section}[]"))]
    return {name: found for name in inner if (found := section_class(name)) is not None}


@cache
def all_keys() -> dict[str, tuple[str, ...]]:
    """Return every key of the schema by its last part: ``{"r": ("adapter.r",), ...}``."""
    dotted: dict[str, None] = {}
    for section in Recipe.model_fields:
        dotted[section] = None
        classes = METHOD_OPTIONS.values() if section == "method" else [section_class(section)]
        for options in classes:
            if options is not None:
                dotted.update(_keys(section, options))
    by_leaf: dict[str, tuple[str, ...]] = {}
    for key in dotted:
        leaf = key.rpartition(".")[2]
        by_leaf[leaf] = (*by_leaf.get(leaf, ()), key)
    return by_leaf


def _keys(section: str, options: type[Options]) -> dict[str, None]:
    keys: dict[str, None] = {f"{section}.{key}": None for key in options.model_fields}
    for name, inner in subsections(section).items():
        keys |= _keys(name, inner)
    return keys


def suggest_key(section: str, key: str, method: str | None = None) -> str | None:
    """Return the dotted key that ``key``, found in ``section``, probably means.

    Tried in turn: a synonym (of a key here, if it is one), a similar key here, the same or a
    similar key anywhere.
    """
    options = section_class(section, method)
    here = {
        name: f"{section}.{name}".lstrip(".") for name in (options.model_fields if options else ())
    }
    word = key.lower().replace("-", "_")
    if word in here:
        return here[word]
    if word in _MEANT:
        return here.get(_MEANT[word].rpartition(".")[2], _MEANT[word])
    if similar := nearest(word, here):
        return here[similar]
    if similar := nearest(word, all_keys(), cutoff=0.75):
        return all_keys()[similar][0]
    return None


def owners(option: str) -> list[str]:
    """Return the methods that have an option of this name."""
    return [name for name, options in METHOD_OPTIONS.items() if option in options.model_fields]

"""What a recipe's task settles, and what does not go with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from pfl_lm.recipe.options import Options, broken

if TYPE_CHECKING:
    from pfl_lm.recipe.schema import Recipe

_PAIRS = ("auto", "prompt_completion", "alpaca")
"""Formats of one text and the one that answers it."""


def fitted_to_task(recipe: Recipe) -> dict[str, Options]:
    """Return the sections that the task changes, by name: none for causal_lm.

    Raises:
        PydanticCustomError: something in the recipe is of another task.
    """
    wrong = _of_another_task(recipe)
    if wrong is not None:
        raise wrong
    if recipe.task != "sequence_classification":
        return {}
    head = recipe.adapter.head or "shared"
    return {
        "adapter": recipe.adapter.model_copy(update={"head": head}),
        "data": recipe.data.model_copy(update={"format": "text_label"}),
    }


def _of_another_task(recipe: Recipe) -> PydanticCustomError | None:
    task, data = recipe.task, recipe.data
    if task != "causal_lm" and (wrong := _of_causal_lm_only(recipe)) is not None:
        return wrong
    if task == "sequence_classification":
        if data.format not in ("auto", "text_label"):
            return broken(
                f"a row of `task: {task}` is a text and its label; write `text_label`, or leave it "
                "out",
                *("data", "format"),
            )
        if recipe.evaluation.metrics:
            return broken(
                f"`{recipe.evaluation.metrics[0]}` is of answers that a model writes, and a "
                "classifier writes none; accuracy and macro-F1 are measured in any case",
                *("evaluation", "metrics"),
            )
        return None
    if recipe.adapter.head is not None:
        return broken(
            f"is for `task: sequence_classification`, where the head is new; with `task: {task}` "
            "the model's own stays frozen; leave it out",
            *("adapter", "head"),
        )
    if data.labels is not None:
        return broken(
            f"is for `task: sequence_classification`; with `task: {task}` leave it out",
            *("data", "labels"),
        )
    if data.format == "text_label":
        return broken(
            f"is for `task: sequence_classification`; with `task: {task}` there are no labels",
            *("data", "format"),
        )
    return _of_no_seq2seq(recipe) if task == "seq2seq_lm" else _of_no_causal_lm(recipe)


def _of_causal_lm_only(recipe: Recipe) -> PydanticCustomError | None:
    """Return what has been tried with causal language models alone; None if there is none of it."""
    task, backbone = recipe.task, recipe.backbone
    for section, name, wanted in (
        ("backbone", "quantization", backbone.quantization != "none"),
        ("backbone", "device_map", backbone.device_map is not None),
        ("training", "gradient_checkpointing", recipe.training.gradient_checkpointing),
        ("runtime", "parallel", recipe.runtime.parallel == "data"),
    ):
        if wanted:
            said = f"has not been tried with `task: {task}`; leave it out"
            return broken(said, section, name)
    if recipe.task == "sequence_classification" and recipe.mixes_ranks:
        return broken(
            f"`r` and `target_modules` of some clients' own have no place for the head of "
            f"`task: {task}`; leave them out",
            "clients",
        )
    if recipe.task == "sequence_classification" and recipe.method.name in ("flexlora", "hetlora"):
        return broken(
            f"`{recipe.method.name}` averages products B A, and the head of `task: {task}` is "
            "none; choose another method",
            *("method", "name"),
        )
    return None


def _of_no_causal_lm(recipe: Recipe) -> PydanticCustomError | None:
    if recipe.evaluation.metrics and recipe.data.format == "text":
        return broken(
            f"`{recipe.evaluation.metrics[0]}` compares an answer with the one in the row, and a "
            "plain text has no answer in it",
            *("evaluation", "metrics"),
        )
    return None


def _of_no_seq2seq(recipe: Recipe) -> PydanticCustomError | None:
    if recipe.data.format not in _PAIRS:
        return broken(
            "`task: seq2seq_lm` answers one text with another; write `prompt_completion` or "
            "`alpaca`, or leave it out",
            *("data", "format"),
        )
    if recipe.backbone.gguf_file is not None:
        return broken(
            "a GGUF file is read as a causal language model; for `task: seq2seq_lm` name a folder "
            "or a Hub id",
            *("backbone", "gguf_file"),
        )
    if recipe.runtime.compile:
        return broken(
            "compiles the one list of layers that a model has, and an encoder with a decoder has "
            "two; leave it out",
            *("runtime", "compile"),
        )
    if recipe.privacy.record_level is not None:
        return broken(
            "a row's own gradient has not been tried through an encoder and a decoder; leave it "
            "out, or choose another task",
            *("privacy", "record_level"),
        )
    return None

"""A model by its task, and the head of one that tells classes apart.

    logits (classes) = head ( trunk (x) )      trunk: from the weights; head: new, and zero

The trunk is an encoder, which pools a row into its first token, or a decoder, whose last token is
taken. With a head of zeros the untouched backbone says of each of C classes 1/C, a loss of ln C,
and the first step moves the head alone. A head that came with the weights is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pfl_lm.errors import ModelError
from pfl_lm.model.targets import first_few
from pfl_lm.recipe.task import Task

if TYPE_CHECKING:
    from pfl_lm.model.backbone import Backbone


def auto_class(task: Task) -> Any:
    """Return the transformers class that loads a model of this task."""
    import transformers

    names = {
        "causal_lm": "AutoModelForCausalLM",
        "sequence_classification": "AutoModelForSequenceClassification",
        "seq2seq_lm": "AutoModelForSeq2SeqLM",
    }
    return getattr(transformers, names[task.name])


def names_of_classes(task: Task) -> dict[str, Any]:
    """Return what a model's configuration says of its classes; empty if it has none."""
    if not task.classifies:
        return {}
    return {
        "num_labels": len(task.labels),
        "id2label": dict(enumerate(task.labels)),
        "label2id": dict(task.numbers),
    }


def load_for_task(task: Task, source: str | Path, **how: Any) -> tuple[Any, tuple[str, ...]]:
    """Load a model, and return it with the names of its head's modules: none but for classes.

    Raises:
        ModelError: the weights lack more than a head, so that part of the trunk would be random.
        OSError, ValueError, KeyError, ImportError: whatever transformers cannot load.
    """
    if not task.classifies:
        return auto_class(task).from_pretrained(source, **how), ()
    model, about = auto_class(task).from_pretrained(
        source,
        **how,
        **names_of_classes(task),
        ignore_mismatched_sizes=True,  # a head of other classes; looked at below
        output_loading_info=True,
    )
    head = head_of(model)
    mismatched = [key if isinstance(key, str) else key[0] for key in about["mismatched_keys"]]
    odd = sorted(
        key
        for key in {*about["missing_keys"], *mismatched}
        if not any(key.startswith(f"{name}.") for name in head)
    )
    if odd:
        raise ModelError(
            f"backbone {source}: its weights lack parts of the model below the head: "
            f"{first_few(odd)}",
            hint="name a backbone whose weights are complete",
        )
    with torch.no_grad():
        for _, parameter in _parameters(model, head):
            parameter.zero_()  # as it would be random, and no two loads alike
    return model, head


def head_of(model: Any) -> tuple[str, ...]:
    """Return the modules of a classifier that stand beside its trunk, in order.

    Raises:
        ModelError: the last of them is not a linear one with an output for each class.
    """
    head = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]
    linear = [
        module
        for name in head
        for module in model.get_submodule(name).modules()
        if isinstance(module, nn.Linear)
    ]
    if not linear or linear[-1].out_features != model.config.num_labels:
        raise ModelError(
            f"backbone: {type(model).__name__} has no head that ends in a linear layer with an "
            "output for each class",
            hint="use an encoder such as BERT, or a decoder such as Llama",
        )
    return tuple(head)


def start_head(model: Any, head: tuple[str, ...], seed: int) -> None:
    """Set a head's layers as the model draws new ones, from ``seed``; its last layer to zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        modules = [model.get_submodule(name) for name in head]
        for module in modules:
            module.apply(model._init_weights)
        last = [each for module in modules for each in module.modules() if _is_linear(each)][-1]
        for parameter in last.parameters():
            parameter.zero_()


def refuse_few_positions(backbone: Backbone, max_length: int) -> None:
    """Check that a model of another task than causal_lm has a position for every token of a row.

    Raises:
        ModelError: rows may be longer than it can read.
    """
    most = getattr(backbone.model.config, "max_position_embeddings", None)
    if backbone.task.name != "causal_lm" and isinstance(most, int) and max_length > most:
        raise ModelError(
            f"data.max_length: {max_length}, and this backbone reads {most} tokens at most",
            hint=f"data.max_length={most}",
        )


def in_float32(module: nn.Module) -> None:
    """Let a head, whose numbers are float32, take the states of a trunk of another precision."""
    module.register_forward_pre_hook(_widened)


def _widened(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.float() if isinstance(each, Tensor) else each for each in given)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _parameters(model: Any, head: tuple[str, ...]) -> Iterator[tuple[str, nn.Parameter]]:
    for name in head:
        yield from model.get_submodule(name).named_parameters(prefix=name)

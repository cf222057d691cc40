"""A backbone without its weights: the tokenizer, the configuration, and the shapes of a model.

What a run would load is looked up as ``backbone.py`` looks it up, but nothing is converted and no
weight is read: the model is built from its configuration on PyTorch's meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfl_lm.model.gguf import converted_folder
from pfl_lm.model.package import folder_path, gguf_path
from pfl_lm.recipe.task import CAUSAL_LM, Task

if TYPE_CHECKING:
    import torch

    from pfl_lm.model.backbone import Backbone
    from pfl_lm.recipe import BackboneOptions


@dataclass(frozen=True, slots=True)
class Source:
    """Where a backbone's small files are.

    Attributes:
        place: a Hub id or a folder.
        gguf_file: a file of that folder that was not converted yet; its header has to do.
    """

    place: str | Path
    gguf_file: str | None = None

    def read(self, kind: Any, options: BackboneOptions) -> Any:
        """Call ``kind.from_pretrained`` on this source, where ``kind`` reads no weights.

        Raises:
            ModelError: it is not there, or is not what transformers can read.
        """
        more = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        try:
            return kind.from_pretrained(self.place, revision=options.revision, **more)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            raise _explained(self.place, options, error) from error


def find_source(options: BackboneOptions, say: Callable[[str], None] = lambda text: None) -> Source:
    """Find a backbone's small files; ``say`` is told if reading them will take long.

    Raises:
        ModelError: the package or its file is not there.
    """
    if options.package is None:
        assert options.model_name_or_path is not None
        return Source(options.model_name_or_path)
    if options.folder is not None:
        return Source(folder_path(options.package, options.folder))
    assert options.gguf_file is not None
    gguf = gguf_path(options.package, options.gguf_file)
    folder = converted_folder(gguf)
    if folder.is_dir():
        return Source(folder)
    say(f"reading the header of {gguf.name}, about half a minute; the first run converts the file")
    return Source(gguf.parent, gguf.name)


def load_tokenizer(source: Source, options: BackboneOptions) -> Any:
    """Load the tokenizer alone.

    Raises:
        ModelError: it is not there.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return source.read(AutoTokenizer, options)


@dataclass(frozen=True, slots=True)
class Outline:
    """A backbone without storage.

    Attributes:
        stored: the precision in which its weights are on disk.
        weights: bytes that they will take, quantized if they are to be.
        unpacked: bytes of the largest quantized matrix while it is multiplied by; else 0.
    """

    backbone: Backbone
    stored: torch.dtype
    weights: int
    unpacked: int = 0


def outline_backbone(
    source: Source,
    options: BackboneOptions,
    dtype: torch.dtype,
    device: torch.device,
    task: Task = CAUSAL_LM,
) -> Outline:
    """Return the backbone a run would load onto ``device``, its parameters on the meta device.

    They are in full precision, whatever the recipe says of quantization; bytes are not.

    Raises:
        ModelError: it is not there, is not a model of this task, or cannot be quantized.
    """
    import torch
    from transformers import AutoConfig

    from pfl_lm.model.backbone import Backbone
    from pfl_lm.model.quantized import quantization_config, refuse_quantized, to_be_quantized
    from pfl_lm.model.tasks import auto_class, head_of, names_of_classes

    quantization = quantization_config(options, dtype, device)
    tokenizer = load_tokenizer(source, options)
    config = source.read(AutoConfig, options)
    refuse_quantized(config, source.place)
    stored = _stored_dtype(source, config)  # before the model writes its own into it
    config.update(names_of_classes(task))

    def build() -> Any:
        with torch.device("meta"):
            return auto_class(task).from_config(
                config, dtype=dtype, attn_implementation=options.attn_implementation
            )

    try:
        model = build()
    except (ValueError, KeyError, ImportError) as error:
        raise _explained(source.place, options, error) from error
    model.requires_grad_(False)
    model.config.use_cache = False
    model.eval()
    name = options.base_model_id or options.model_name_or_path or str(source.place)
    names = [] if quantization is None else to_be_quantized(build(), quantization)
    matrices = [model.get_submodule(name) for name in names]
    weights, unpacked = _bytes(model, matrices, options)
    head = head_of(model) if task.classifies else ()
    backbone = Backbone(model, tokenizer, name, options.revision, task=task, head=head)
    if task.classifies:
        model.config.pad_token_id = backbone.pad_token_id
    return Outline(backbone, stored, weights, unpacked)


def _bytes(model: Any, quantized: Sequence[Any], options: BackboneOptions) -> tuple[int, int]:
    """Return the bytes of all weights, and of the largest quantized matrix as it was before."""
    from pfl_lm.model.quantized import quantized_bytes

    n_bytes = sum(each.numel() * each.dtype.itemsize for each in model.parameters())
    unpacked = 0
    for layer in quantized:
        plain = layer.weight.numel() * layer.weight.dtype.itemsize
        rows = getattr(layer, "out_features", None) or layer.weight.shape[1]  # a Conv1D's lie down
        n_bytes += quantized_bytes(options, layer.weight.numel(), rows) - plain
        unpacked = max(unpacked, plain)
    return n_bytes, unpacked


def _stored_dtype(source: Source, config: Any) -> torch.dtype:
    import torch

    named = getattr(config, "dtype", None)
    if source.gguf_file is not None or named is None:  # conversion writes float32
        return torch.float32
    found = getattr(torch, named) if isinstance(named, str) else named
    assert isinstance(found, torch.dtype)
    return found


def _explained(place: str | Path, options: BackboneOptions, error: Exception) -> Exception:
    from pfl_lm.model.backbone import not_loaded

    return not_loaded(place, options, error)

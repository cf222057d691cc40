"""The frozen language model all clients share: found, loaded once, put on its device, never moved.

Three sources: a Hub id, a local folder, a GGUF file or a folder inside an installed package.
safetensors only; code that comes with a model is never run.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pfl_lm.errors import ModelError
from pfl_lm.model.gguf import convert, converted_folder
from pfl_lm.model.package import folder_path, gguf_path
from pfl_lm.model.quantized import (
    described,
    keep_as_they_are,
    quantization_config,
    refuse_quantized,
)
from pfl_lm.model.tasks import load_for_task
from pfl_lm.recipe.task import CAUSAL_LM, Task

if TYPE_CHECKING:
    from pfl_lm.recipe import BackboneOptions


# It says on import which kernels it has not got, and at every product of 8 bits that it rounds.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_SAMPLED = 256
"""About how many numbers of each parameter a fingerprint reads."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """One resident, frozen language model with its tokenizer.

    Attributes:
        model: a transformers model of the task, every parameter frozen.
        tokenizer: a fast tokenizer, for conversations one with a chat template.
        name: the Hub id for cards and adapter configs, or the folder where there is none.
        revision: the revision asked for, if any.
        fingerprint: what tells these weights from others, in hexadecimal.
        task: what the model is for.
        head: the modules that are new to the weights, and zero, if the task needs any.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    fingerprint: str = ""
    task: Task = CAUSAL_LM
    head: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the weights are; of a backbone on several GPUs, where its first ones are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the frozen weights."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    @property
    def is_spread(self) -> bool:
        """Whether the weights lie on several devices."""
        return len({parameter.device for parameter in self.model.parameters()}) > 1

    @property
    def pad_token_id(self) -> int:
        """The id that fills a batch up; masked by position, so any id would do."""
        tokenizer = self.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def load_backbone(
    options: BackboneOptions,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
    task: Task = CAUSAL_LM,
) -> Backbone:
    """Load the backbone of a recipe onto its device, quantized if it is to be, and freeze it.

    With ``device_map: auto`` and a GPU it is spread over all GPUs. ``say`` is told what takes long.

    Raises:
        ModelError: it is not there, not a model of this task, not in safetensors, cannot be
            quantized, or is too large for the GPUs.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = pick_dtype(options.dtype, device)
    quantization = quantization_config(options, dtype, device)
    spread = options.device_map is not None and device.type == "cuda"
    more: dict[str, Any] = {}
    if quantization is not None or spread:
        more = {
            "quantization_config": quantization,
            "device_map": options.device_map if spread else {"": device},
        }
    source = _source(options, say)
    try:
        refuse_quantized(AutoConfig.from_pretrained(source, revision=options.revision), source)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=options.revision)
        model, head = load_for_task(
            task,
            source,
            revision=options.revision,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=options.attn_implementation,
            **more,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise not_loaded(source, options, error) from error
    model.requires_grad_(False)
    model.config.use_cache = False
    if spread:
        _refuse_beyond_gpus(model.hf_device_map, source)
    if quantization is not None:
        keep_as_they_are(model)
    fingerprint = _fingerprint(model, described(options, dtype))
    model.eval()
    if not more:
        model.to(device)
    name = options.base_model_id or options.model_name_or_path or str(source)
    backbone = Backbone(model, tokenizer, name, options.revision, fingerprint, task, head)
    if task.classifies:  # where a row ends is told by the token that fills up
        model.config.pad_token_id = backbone.pad_token_id
    return backbone


def _refuse_beyond_gpus(device_map: Mapping[str, int | str], source: str | Path) -> None:
    """Check that Accelerate has found room for all layers on GPUs.

    Raises:
        ModelError: some would lie in main memory or on disk and be copied to a GPU in every step.
    """
    beyond = [name for name, place in device_map.items() if str(place) in ("cpu", "disk", "meta")]
    if beyond:
        raise ModelError(
            f"backbone {source}: does not fit on the GPUs of this machine; {len(beyond)} of its "
            f"{len(device_map)} parts, from {beyond[0]} on, would not lie on one",
            hint="backbone.quantization=nf4 takes a quarter of bfloat16's memory; or use more GPUs",
        )


def _fingerprint(model: Any, quantization: str) -> str:
    """Hash every parameter's name, shape and type, and some of its numbers; and how it computes."""
    made = hashlib.sha256(quantization.encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        part = flat[:: max(1, len(flat) // _SAMPLED)].cpu().contiguous()
        made.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        made.update(part.view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the precision of the frozen weights: as asked, or what this device is good at.

    ``auto`` is bfloat16 on GPUs and CPUs that multiply it natively (x86: with AVX512-BF16 or AMX),
    float32 elsewhere. The adapter and everything a method keeps are float32 in any case.
    """
    if wanted != "auto":
        dtype = getattr(torch, wanted)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = _cpu_multiplies_bfloat16()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; what mkldnn supports, it may only emulate."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _source(options: BackboneOptions, say: Callable[[str], None]) -> str | Path:
    if options.package is not None:
        if options.folder is not None:
            return folder_path(options.package, options.folder)
        assert options.gguf_file is not None
        gguf = gguf_path(options.package, options.gguf_file)
        folder = converted_folder(gguf)
        if not folder.is_dir():
            say(f"converting {gguf.name} to safetensors, this once: {folder}")
            convert(gguf, folder)
        return folder
    assert options.model_name_or_path is not None
    return options.model_name_or_path


def not_loaded(source: str | Path, options: BackboneOptions, error: Exception) -> ModelError:
    """Return what to tell a person about a backbone that transformers could not load."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if _is_folder(source):
        hint = "the folder needs config.json, tokenizer files and model.safetensors"
    elif options.revision is not None:
        hint = f"check that the Hub has revision {options.revision!r} of {source}"
    else:
        hint = (
            f"check the id on the Hub; for a gated model run `hf auth login`; without a network, "
            f"run `hf download {shlex.quote(str(source))}` once where there is one"
        )
    return ModelError(f"backbone {source}: cannot be loaded: {reason}", hint=hint)


def _is_folder(source: str | Path) -> bool:
    try:
        return Path(source).is_dir()
    except OSError:  # too long for a name
        return False

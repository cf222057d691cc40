"""A frozen backbone whose linear layers are kept in 4 or 8 bits, by bitsandbytes.

    nf4     blocks of 64 numbers, each with a scale in float32; with double quantization the scales
            are 8 bits, in blocks of 256 with a scale each            (Dettmers et al. 2023, QLoRA)
    int8    each row with a scale in float32                (Dettmers et al. 2022, LLM.int8())

Embedding, head and norms stay in the backbone's dtype, an adapter and all that a method keeps in
float32. Weights are quantized while they are read, on the device they will stay on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pfl_lm.errors import ModelError

if TYPE_CHECKING:
    from pfl_lm.recipe import BackboneOptions

_DEVICES = ("cuda", "cpu")
_BLOCK, _BLOCK_OF_SCALES = 64, 256
_CODES = {4: 16, 8: 256}
"""How many values there are for so many bits; each quantized matrix keeps its own list of them."""


def quantization_config(
    options: BackboneOptions, dtype: torch.dtype, device: torch.device
) -> Any | None:
    """Return transformers' word for how to quantize; None if nothing is to be.

    Raises:
        ModelError: bitsandbytes does not compute on this device here.
    """
    if options.quantization == "none":
        return None
    if device.type not in _DEVICES:
        raise ModelError(
            f"backbone.quantization: {options.quantization} is for GPUs of NVIDIA (cuda) and for "
            f"CPUs; this run would be on {device.type}",
            hint="leave backbone.quantization out; or run on the CPU: ACCELERATE_USE_CPU=true",
        )
    from transformers import BitsAndBytesConfig

    if options.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=options.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=_compute_dtype(options, dtype),
    )


def described(options: BackboneOptions, dtype: torch.dtype) -> str:
    """Return in what a quantized backbone differs from others of the same numbers; may be empty."""
    if options.quantization != "nf4":
        return "" if options.quantization == "none" else options.quantization
    double = options.bnb_4bit_use_double_quant
    return f"nf4, double quantization {double}, computes in {_compute_dtype(options, dtype)}"


def _compute_dtype(options: BackboneOptions, dtype: torch.dtype) -> torch.dtype:
    chosen = options.bnb_4bit_compute_dtype
    return dtype if chosen is None else getattr(torch, chosen)


def refuse_quantized(config: Any, source: object) -> None:
    """Check that weights are not stored as bitsandbytes makes them.

    Raises:
        ModelError: they are.
    """
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict):
        return
    method = stored.get("quant_method")  # folders of old do not name it
    if method != "bitsandbytes" and not (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        return
    raise ModelError(
        f"backbone {source}: its weights are stored quantized by bitsandbytes; pfl-lm quantizes "
        "while it loads, so that adapters belong to the model of full precision",
        hint="name the model that it was made from, and set backbone.quantization",
    )


def keep_as_they_are(model: nn.Module) -> None:
    """Make quantized layers compute alike in training and scoring, and never change their weights.

    On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit matrix in place at the first forward in
    eval mode, and has no way back through it: gradients below would be zero from then on. And an
    8-bit layer on a CPU rounds its input to 8 bits too, but in eval mode only: scores would be of
    another model than the one that is trained.
    """
    for layer in quantized_layers(model):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        else:
            layer.train(True)
            layer.train = lambda mode=True, layer=layer: layer


def quantized_layers(model: nn.Module) -> list[Any]:
    """Return the layers that bitsandbytes keeps in few bits."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return [each for each in model.modules() if isinstance(each, Linear4bit | Linear8bitLt)]


def to_be_quantized(model: Any, configuration: Any) -> list[str]:
    """Return the names of the layers that transformers would quantize.

    Spends the model, which lies on the meta device.
    """
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(configuration, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    made = set(map(id, quantized_layers(model)))
    return [name for name, module in model.named_modules() if id(module) in made]


def quantized_bytes(options: BackboneOptions, n: int, rows: int) -> int:
    """Return the bytes of a matrix of ``n`` numbers and so many rows once it is quantized."""
    if options.quantization == "int8":
        return n + 4 * rows
    blocks = -(-n // _BLOCK)
    packed = (n + 1) // 2 + 4 * _CODES[4]
    if not options.bnb_4bit_use_double_quant:
        return packed + 4 * blocks
    return packed + blocks + 4 * -(-blocks // _BLOCK_OF_SCALES) + 4 * _CODES[8] + 4

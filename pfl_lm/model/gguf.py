"""A GGUF file becomes a Hugging Face folder, once: dequantised, cached, from then on quick to load.

Reading a GGUF file means parsing it in Python (half a minute for 135 million parameters), so the
first run writes safetensors to ``$PFL_LM_CACHE``, or to ``pfl-lm`` under the user's cache folder.
The folder's name carries the file's SHA-256; it appears under that name only when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from pfl_lm.errors import ModelError

_FORMAT = 1  # raise it when the conversion changes, and old folders are left alone


def cache_folder() -> Path:
    """Return where converted backbones are kept; it need not exist yet."""
    if chosen := os.environ.get("PFL_LM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pfl-lm"


def converted_folder(gguf: Path) -> Path:
    """Return where the safetensors copy of this GGUF file lies, or would lie."""
    about = gguf.stat()
    digest = _sha256(gguf, about.st_size, about.st_mtime_ns)
    return cache_folder() / "backbones" / f"{gguf.stem}-v{_FORMAT}-{digest[:16]}"


@cache
def _sha256(gguf: Path, size: int, changed: int) -> str:
    with gguf.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(gguf: Path, folder: Path) -> None:
    """Make the safetensors copy of a GGUF file: its `converted_folder`, which is not there yet.

    Writes weights in float32, the tokenizer and its chat template. Two processes may do so at once:
    the one that finishes second throws its copy away.

    Raises:
        ModelError: the file cannot be read as a causal language model, or the cache not written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    except OSError as error:
        raise ModelError(
            f"the cache folder {folder.parent} cannot be written: {error.strerror}",
            hint="set PFL_LM_CACHE to a folder you can write to (a few hundred MB are needed)",
        ) from error
    try:
        _write_safetensors(gguf, unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise ModelError(
                f"{gguf.name}: could not be converted into {folder.parent}: {error}",
                hint="see that the disk has room for four bytes per parameter",
            ) from error
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{gguf}: not a GGUF file that transformers can read: {error}",
            hint="point backbone.model_name_or_path at a Hugging Face folder or Hub id instead",
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_safetensors(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The weights are dense by now, yet transformers keeps calling the model quantized and would
    # refuse to save it.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

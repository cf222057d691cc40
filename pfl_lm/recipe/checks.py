"""What a valid recipe needs of this machine: a model folder, its extras."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from pfl_lm.errors import ModelError, PflError
from pfl_lm.recipe.privacy import PrivacyOptions
from pfl_lm.recipe.sections import BackboneOptions, RuntimeOptions

_THREADS_A_CORE = 16


def refuse_no_model(folder: Path, key: str = "backbone.model_name_or_path") -> None:
    """Check that ``folder`` is a model folder: config.json and weights in safetensors.

    ``key`` is where a recipe names it.

    Raises:
        ModelError: it is not there, not a folder, or misses a file.
    """
    hint = "name a folder with config.json and model.safetensors, or a Hub id such as ORG/NAME"
    try:
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "there is no such folder"
            raise ModelError(f"{key}: {folder}: {what}", hint=hint)
        missing = [] if (folder / "config.json").is_file() else ["config.json"]
        weights = (path for path in folder.glob("*.safetensors") if path.is_file())
        missing += [] if any(weights) else ["*.safetensors"]
    except OSError as error:
        reason = f"cannot be looked at ({error.strerror})"
        raise ModelError(f"{key}: {folder}: {reason}", hint=hint) from None
    if missing:
        raise ModelError(f"{key}: {folder}: has no {' and no '.join(missing)}", hint=hint)


def refuse_no_tracker(runtime: RuntimeOptions) -> None:
    """Check that the package which ``runtime.tracking`` asks for is installed; it is not imported.

    Raises:
        PflError: it is not.
    """
    if runtime.tracking == "tensorboard" and find_spec("tensorboard") is None:
        raise PflError(
            "runtime.tracking: tensorboard is not installed here",
            hint='pip install "pfl-lm[tracking]"',
        )


def refuse_no_quantizer(backbone: BackboneOptions) -> None:
    """Check that bitsandbytes is installed if it is to quantize; it is not imported.

    Raises:
        PflError: it is not.
    """
    if backbone.quantization != "none" and find_spec("bitsandbytes") is None:
        raise PflError(
            f"backbone.quantization: {backbone.quantization} needs bitsandbytes, which is not "
            "installed here",
            hint='pip install "pfl-lm[quantization]"',
        )


def refuse_many_threads(runtime: RuntimeOptions) -> None:
    """Check that ``runtime.threads`` is no more than a machine like this one bears.

    Threads that wait for a core make every step slower, and thousands make it stand still.

    Raises:
        PflError: there are more than sixteen to a core.
    """
    cores = os.cpu_count() or 1
    if runtime.threads is not None and runtime.threads > _THREADS_A_CORE * cores:
        raise PflError(
            f"runtime.threads: {runtime.threads}, and this machine has {cores} cores; the most is "
            f"{_THREADS_A_CORE * cores}",
            hint=f"runtime.threads={cores} is one a core",
        )


def refuse_no_opacus(privacy: PrivacyOptions) -> None:
    """Check that Opacus is installed if a privacy lever is set; it is not imported.

    Raises:
        PflError: it is not.
    """
    if privacy.first_asked and find_spec("opacus") is None:
        raise PflError(
            f"privacy.{privacy.first_asked}: opacus is not installed here",
            hint='pip install "pfl-lm[privacy]"',
        )

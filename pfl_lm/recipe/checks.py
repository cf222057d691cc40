"""What a valid recipe needs of this machine: a model folder, an empty run folder, its extras."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from pfl_lm.errors import ModelError, PflError, RunFolderError
from pfl_lm.recipe.privacy import PrivacyOptions
from pfl_lm.recipe.sections import RuntimeOptions


def refuse_occupied(folder: Path) -> None:
    """Check that a run can be written to ``folder``: nothing is in it and it can be made.

    Raises:
        RunFolderError: it is a file or not empty, or the nearest folder above it is not writable.
    """
    other = "choose another `name` or `runtime.output_dir`"
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise RunFolderError(
                f"{folder}: this run folder already holds a run", hint=f"{other}, or remove it"
            )
        above = next(each for each in (folder, *folder.parents) if each.exists())
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be used ({error.strerror})", hint=other) from None
    if not above.is_dir():
        raise RunFolderError(f"{folder}: {above} is a file, not a folder", hint=other)
    if not os.access(above, os.W_OK | os.X_OK):
        raise RunFolderError(f"{folder}: cannot be made, {above} is not writable", hint=other)


def refuse_no_model(folder: Path) -> None:
    """Check that ``folder`` is a model folder: config.json and weights in safetensors.

    Raises:
        ModelError: it is not there, not a folder, or misses a file.
    """
    key = "backbone.model_name_or_path"
    hint = "name a folder with config.json and model.safetensors, or a Hub id such as ORG/NAME"
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "there is no such folder"
        raise ModelError(f"{key}: {folder}: {what}", hint=hint)
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    missing += [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
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

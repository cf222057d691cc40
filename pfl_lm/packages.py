"""Installed Python packages, found where they lie and never imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def package_folders(package: str) -> list[Path] | None:
    """Return the folders that an installed package's files are in; None if it is not installed.

    There are none of a package that is one module and no folder. What is returned need not be a
    folder: a package may lie in an archive.

    Args:
        package: its name for ``import``; a dash stands for an underscore.
    """
    for name in dict.fromkeys((package, package.replace("-", "_"))):
        if "." in name:  # looking for a.b would import a
            break
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):
            continue
        if spec is not None:
            return [Path(folder) for folder in spec.submodule_search_locations or ()]
    return None

"""A file of rows inside an installed package, which is never imported. No torch here."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePosixPath

from pfl_lm.data.files import KINDS
from pfl_lm.data.words import did_you_mean, quoted
from pfl_lm.errors import DataError
from pfl_lm.packages import package_folders

_MOST_LOOKED_AT = 10_000
"""Of a package with more files than that, no other file is suggested."""


def packaged_file(package: str, data_file: str) -> Path:
    """Return where ``data_file`` of an installed package lies.

    Args:
        package: its name for ``import``; a dash stands for an underscore.
        data_file: a name relative to the package's folder, without ``..``.

    Raises:
        DataError: the package is not installed or lies in an archive, or has no such file.
    """
    folders = package_folders(package)
    if folders is None:
        raise DataError(
            f"data.package: {package!r} is not installed here",
            hint="install it with pip, where it may have another name than for `import`",
        )
    if not folders:
        raise DataError(f"data.package: {package!r} is one module, and has no files beside it")
    if not any(folder.is_dir() for folder in folders):
        raise DataError(
            f"data.package: {package!r} lies in an archive ({folders[0]}), which is not read",
            hint="install it with pip, which unpacks it",
        )
    inside = PurePosixPath(data_file)
    for folder in folders:
        with suppress(OSError):  # too long for a name
            path = folder / inside
            if path.is_file():
                _refuse_way_out(path, folder, package, data_file)
                return path
    there = _files_with_rows(folders)
    raise DataError(
        f"data.data_file: the package {package!r} has no file {data_file!r}"
        f"{did_you_mean(data_file, {name: name for name in there})}",
        hint=f"it has {quoted(there)}" if there else f"it has no file in one of {', '.join(KINDS)}",
    )


def _refuse_way_out(path: Path, folder: Path, package: str, data_file: str) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"data.data_file: {data_file!r} of the package {package!r} is a link out of it",
            hint="name the file itself in data.path",
        )


def _files_with_rows(folders: list[Path]) -> list[str]:
    """Return the names of the files that could be read, as far as there are not too many."""
    return sorted(
        path.relative_to(folder).as_posix()
        for folder in folders
        for path in islice(folder.rglob("*"), _MOST_LOOKED_AT)
        if path.suffix.lower() in KINDS
    )

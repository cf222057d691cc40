"""Reading a file of a run folder that may have been made to deceive.

Not one symbolic link on the way down from the run folder is followed, so nothing outside it is ever
read; and only ordinary files are, up to a stated size.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pfl_lm.errors import RunFolderError

_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def read_sealed(run_folder: Path, name: str, max_bytes: int) -> bytes:
    """Return the content of ``run_folder/name``; ``name`` has ``/`` between its parts.

    Raises:
        RunFolderError: a part of ``name`` is a link or leads out, or the file is missing, no
            ordinary one, too large or unreadable.
    """
    with open_sealed(run_folder, name, max_bytes) as (file, size):
        content = file.read(size + 1)
    if len(content) > size:
        raise RunFolderError(f"{run_folder / name}: changed while it was being read")
    return content


@contextmanager
def open_sealed(run_folder: Path, name: str, max_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """Open ``run_folder/name`` for reading as `read_sealed` does; yield it, and its size.

    Raises:
        RunFolderError: as `read_sealed`, and if reading fails while the file is open.
    """
    where = run_folder / name
    with _explained(where):
        descriptor = _descend(run_folder, name)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise RunFolderError(f"{where}: not an ordinary file")
            if status.st_size > max_bytes:
                raise RunFolderError(f"{where}: larger than {max_bytes} bytes")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                yield file, status.st_size
        finally:
            os.close(descriptor)


def _descend(run_folder: Path, name: str) -> int:
    *folders, last = name.split("/")
    descriptor = os.open(run_folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in folders:
        descriptor = _step(descriptor, part, _FOLDER)
    return _step(descriptor, last, _FILE)


def _step(above: int, part: str, flags: int) -> int:
    """Open ``part`` in an open folder, and close the folder."""
    try:
        if part in ("", ".", "..") or "\0" in part or not _encodable(part):
            raise RunFolderError(f"{part!r} is not a name within a run folder")
        return os.open(part, flags, dir_fd=above)
    finally:
        os.close(above)


def _encodable(part: str) -> bool:
    try:
        os.fsencode(part)
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _explained(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            reason = "a link, or below one; links in a run folder are not followed"
        raise RunFolderError(f"{where}: {reason}") from None

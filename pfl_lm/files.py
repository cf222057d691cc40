"""Files: written so that a reader finds the old or the new one whole; opened only if ordinary."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pfl_lm.errors import RunFolderError


def write_atomically(path: Path, content: bytes) -> str:
    """Write a file under its final name only when it is complete and on disk.

    Returns the SHA-256 of the content, in hexadecimal. Makes the parent folder if need be.

    Raises:
        RunFolderError: no space, no permission.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync_folder(path.parent)
    return hashlib.sha256(content).hexdigest()


def open_ordinary(path: Path) -> BinaryIO:
    """Open an ordinary file to read its bytes.

    Anything else is refused without waiting: a pipe may have nobody at its other end, and a device
    no end at all.

    Raises:
        OSError: it cannot be opened, or is no ordinary file.
    """
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, os.O_RDONLY | flags)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise OSError(errno.EINVAL, "not an ordinary file")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a write below ``path`` into a RunFolderError."""
    try:
        yield
    except OSError as error:
        hint = "see that the folder can be written to"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "make room on this disk; what was committed before is intact"
        raise RunFolderError(f"{path}: cannot be written: {error.strerror}", hint=hint) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)

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

from pfl_lm.errors import RunFolderError

_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def read_sealed(run_folder: Path, name: str, max_bytes: int) -> bytes:
    """Return the content of ``run_folder/name``; ``name`` has ``/`` between its parts.

    Raises:
        RunFolderError: a part of ``name`` is a link or leads out, or the file is missing, no
            ordinary one, too large or unreadable.
    """
    where = run_folder / name
    *folders, last = name.split("/")
    with _explained(where):
        descriptor = os.open(run_folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in folders:
            descriptor = _step(descriptor, part, _FOLDER)
        descriptor = _step(descriptor, last, _FILE)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RunFolderError(f"{where}: not an ordinary file")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                content = file.read(min(max_bytes, os.fstat(descriptor).st_size) + 1)
        finally:
            os.close(descriptor)
    if len(content) > max_bytes:
        raise RunFolderError(f"{where}: larger than {max_bytes} bytes")
    return content


def _step(above: int, part: str, flags: int) -> int:
    """Open ``part`` in an open folder, and close the folder."""
    if part in ("", ".", ".."):
        os.close(above)
        raise RunFolderError(f"{part!r} is not a name within a run folder")
    try:
        return os.open(part, flags, dir_fd=above)
    finally:
        os.close(above)


@contextmanager
def _explained(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            reason = "a link, or below one; links in a run folder are not followed"
        raise RunFolderError(f"{where}: {reason}") from None

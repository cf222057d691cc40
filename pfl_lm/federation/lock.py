"""One process at a time in one run folder.

The lock is the operating system's, on the file ``federation.lock``: it is gone when its process is,
however that ended, so a file that was left behind by a killed process holds nobody up. What stands
in the file is for people.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pfl_lm.errors import RunFolderError
from pfl_lm.federation.folder import LOCK
from pfl_lm.files import explained

_held: set[Path] = set()


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which must exist, while the body runs.

    A process that holds it already may take it again.

    Raises:
        RunFolderError: another process holds it, or the file cannot be written.
    """
    path = folder.resolve() / LOCK
    if path in _held:
        yield
        return
    descriptor = _locked(path)
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        with suppress(OSError):  # on a disk that has become read-only it stays, and holds nobody up
            path.unlink()  # while it is still ours
        os.close(descriptor)


def _locked(path: Path) -> int:
    """Open the file and lock it; make sure that it is still the one of that name."""
    while True:
        with explained(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o644)
        try:
            _lock(descriptor, path)
            if not _is_named(descriptor, path):  # its holder has just removed it
                os.close(descriptor)
                continue
            with explained(path):
                os.ftruncate(descriptor, 0)
                who = {"host": platform.node(), "pid": os.getpid()}
                os.pwrite(descriptor, json.dumps(who).encode(), 0)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunFolderError(
            f"{path.parent}: another process is at work in this run folder{_who(descriptor)}",
            hint="wait until it is done, or stop it; a process that was killed holds no lock",
        ) from None
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be locked: {error.strerror}",
            hint="put runtime.output_dir on a file system that has locks",
        ) from error


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _who(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, 1000, 0))
        return f" (process {int(who['pid'])} on {str(who['host'])[:100]})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""

"""Disks for tests: one in memory, and one that loses its power or becomes read-only in mid-run.

Both are mounted, which takes Linux and its root.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from pathlib import Path

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_NO_LOG_FLUSH = 2


class NoDiskError(Exception):
    """A file system cannot be made or mounted here."""


def mount(*arguments: str) -> None:
    """Call ``mount``.

    Raises:
        NoDiskError: it is not there or not permitted.
    """
    _call("mount", *arguments)


class Ext4:
    """A file system in a file below ``place``, mounted at ``folder``.

    Raises:
        NoDiskError: from its making, if that is not possible here.
    """

    def __init__(self, place: Path, *, megabytes: int = 24) -> None:
        self.image, self.folder = place / "disk.img", place / "disk"
        with self.image.open("wb") as file:
            file.truncate(megabytes * 2**20)
        self.folder.mkdir()
        _call("mkfs.ext4", "-q", str(self.image))
        self.mount()

    def mount(self) -> None:
        """Mount it; what its journal holds is brought into order first, as after a power cut."""
        mount("-o", "loop,errors=remount-ro", str(self.image), str(self.folder))

    def unmount(self) -> None:
        """Unmount it, if it is mounted."""
        if self.folder.is_mount():
            _call("umount", str(self.folder))

    def repair(self) -> None:
        """Mend it as a person would after an error, and mount it again."""
        self.unmount()
        # 1: what was wrong has been put right
        subprocess.run(["fsck.ext4", "-p", str(self.image)], check=False, capture_output=True)
        self.mount()

    def cut_power(self) -> None:
        """Let everything go that was not synced; from here on every call fails."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(descriptor)

    def turn_read_only(self) -> None:
        """Let the kernel find an error, upon which it makes the file system read-only."""
        device = os.stat(self.folder).st_dev  # noqa: PTH116
        block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
        Path(f"/sys/fs/ext4/{block}/trigger_fs_error").write_text("a test")


def _call(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoDiskError(f"{command[0]}: it takes Linux and its root") from error

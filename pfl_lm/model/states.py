"""What rows are below the adapter, remembered: in memory first, then in a file without a name.

    memory      up to ``most_bytes``, on the backbone's device
    file        up to half of what is free on its disk, while at least that half stays free

What was kept stays, and what finds no room is made again whenever it is met. Training and scoring
walk through the same rows over and over: forgetting the oldest of them would forget each just
before it comes back, while those that stay are found in every pass.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pfl_lm.recipe import RuntimeOptions

MOST_BYTES = 2**30
"""How much is remembered in memory."""

Row = tuple[int, ...]


class TrunkStates:
    """The states that were made, by row: ``(tokens, hidden)`` in the backbone's dtype.

    They are of one backbone, on its device; ``depth`` is the number of layers they have gone
    through, and another depth forgets them all.

    Args:
        folder: on whose disk the file may be, once memory is full; None for memory alone.
        most_bytes: how much memory may take, `MOST_BYTES` unless it is given.
    """

    def __init__(self, folder: Path | None = None, most_bytes: int | None = None) -> None:
        self.most_bytes = MOST_BYTES if most_bytes is None else most_bytes
        self.depth = 0
        self.n_bytes = 0
        self._of: dict[bytes, Tensor] = {}
        self._file = None if folder is None else StatesFile(folder)

    def of(self, depth: int, row: Row, make: Callable[[Row], Tensor]) -> Tensor:
        """Return a row's states, made now if they are not there. They are not to be changed."""
        if depth != self.depth:
            self._forget()
            self.depth = depth
        key = hashlib.sha256(array("q", row)).digest()
        found = self._of.get(key)
        if found is None and self._file is not None:
            found = self._file.read(key)
        return self._keep(key, make(row)) if found is None else found

    def _keep(self, key: bytes, states: Tensor) -> Tensor:
        if self.n_bytes + states.nbytes <= self.most_bytes:
            self._of[key] = states
            self.n_bytes += states.nbytes
        elif self._file is not None:
            self._file.append(key, states)
        return states

    def _forget(self) -> None:
        self._of.clear()
        self.n_bytes = 0
        if self._file is not None:
            self._file = StatesFile(self._file.folder)


def states_of(runtime: RuntimeOptions) -> TrunkStates:
    """Return what a run of a checked recipe remembers: nothing yet."""
    return TrunkStates(Path(runtime.output_dir) if runtime.trunk_cache == "auto" else None)


class _Place(NamedTuple):
    """Where a tensor's bytes lie in the file, and what they were when they were written."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    crc: int


class StatesFile:
    """Tensors in a file that nobody else can see, and that is gone with this process.

    The file has no name (where the system cannot make such a one, its name is taken away before
    anything is written), so the system frees it however the process ends. It is opened with the
    first tensor, for its owner alone. It fills at most half of what its disk then has free, and
    leaves that half free whoever else writes. Whatever goes wrong with it, on a full disk or a
    broken one, only means that something is not there.

    It is read by ``pread`` into a new tensor and not through a map of its pages: a disk that fails
    then is an error to catch and not the end of the process, and pages that were read do not count
    as memory of the process. Nothing but that tensor is copied.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.n_bytes = 0
        self._of: dict[bytes, _Place] = {}
        self._file: IO[bytes] | None = None
        self._owner = 0
        self._reserve = 0
        self._refused = False

    def read(self, key: bytes) -> Tensor | None:
        """Return a tensor as it was written, to the bit; None if it is not there."""
        place = self._of.get(key)
        if place is None or self._file is None or self._owner != os.getpid():
            return None
        read = torch.empty(place.shape, dtype=place.dtype)
        if not self._fill(_bytes(read), place):
            del self._of[key]  # whoever asks makes it again
            return None
        return read.to(place.device)

    def append(self, key: bytes, states: Tensor) -> None:
        """Write a tensor behind the others, if there is room for it."""
        content = _bytes(states.cpu().contiguous())
        try:
            if not self._opened() or not self._has_room(len(content)):
                return
            assert self._file is not None
            done = 0
            while done < len(content):
                done += os.pwrite(self._file.fileno(), content[done:], self.n_bytes + done)
        except OSError:
            self._refuse()
            return
        crc = zlib.crc32(content)
        self._of[key] = _Place(self.n_bytes, states.shape, states.dtype, states.device, crc)
        self.n_bytes += len(content)

    def _fill(self, content: memoryview, place: _Place) -> bool:
        assert self._file is not None
        done = 0
        try:
            while done < len(content):
                part = os.pread(self._file.fileno(), len(content) - done, place.start + done)
                if not part:
                    return False
                content[done : done + len(part)] = part
                done += len(part)
        except OSError:
            return False
        return zlib.crc32(content) == place.crc

    def _opened(self) -> bool:
        """Whether there is a file to write to; one that was opened before a fork is another's."""
        if self._refused or (self._file is not None and self._owner != os.getpid()):
            return False
        if self._file is None:
            self._refused = True  # unless it can be opened
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            self._owner = os.getpid()
            self._reserve = self._free() // 2
            self._refused = False
        return True

    def _has_room(self, n: int) -> bool:
        return self.n_bytes + n <= self._reserve <= self._free() - n

    def _free(self) -> int:
        assert self._file is not None
        disk = os.fstatvfs(self._file.fileno())
        return disk.f_bavail * disk.f_frsize

    def _refuse(self) -> None:
        """Take no more, and give back what half a tensor has taken."""
        self._refused = True
        if self._file is not None:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self.n_bytes)


def _bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's own bytes: writing to them writes to it."""
    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)

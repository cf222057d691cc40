"""Sorted rules over uploads that lie on disk: what they read, and what they make of a change."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pfl_lm.errors import AggregationError, RunFolderError
from pfl_lm.federation.history import StateFile
from pfl_lm.federation.store import Store, StoredUploads
from pfl_lm.methods import Upload
from pfl_lm.methods.aggregate import Sent
from pfl_lm.methods.robust import median, trimmed_mean

N, D, WIDTH = 9, 1_000, 90
CHUNK = 4 * N * WIDTH
"""Twelve chunks, the last one short."""
CHANGED = 4
"""Which upload changes."""


@dataclass
class Kept:
    """Uploads in memory, and the same on disk."""

    uploads: list[Upload]
    store: Store
    files: list[tuple[str, StateFile]]

    @property
    def stored(self) -> StoredUploads:
        return StoredUploads(self.store, self.files)

    @property
    def victim(self) -> Path:
        return self.store.run_folder / self.files[CHANGED][1].path


def kept(folder: Path, n: int = N, d: int = D) -> Kept:
    generator = torch.Generator().manual_seed(5)
    uploads = [
        Upload({name: torch.randn(d, generator=generator) for name in ("B", "weights", "A")}, 1.0)
        for _ in range(n)
    ]
    store = Store(folder, {f"c-{i}": f"c-{i}" for i in range(n)}, torch.device("cpu"))
    files = [
        (client, store.save_upload(client, 1, upload))
        for client, upload in zip(store.slugs, uploads, strict=True)
    ]
    return Kept(uploads, store, files)


@pytest.fixture
def disk(tmp_path: Path) -> Kept:
    return kept(tmp_path)


@pytest.mark.parametrize("name", ["weights", "A", "B"])
@pytest.mark.parametrize("chunk", [4 * N, CHUNK, 4 * N * D])
def test_the_bits_are_those_of_uploads_in_memory(disk: Kept, name: str, chunk: int) -> None:
    stored, here = Sent(disk.stored, name), Sent(disk.uploads, name)
    assert torch.equal(median(stored, chunk), median(here))
    assert torch.equal(trimmed_mean(stored, 2, chunk), trimmed_mean(here, 2))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="takes Linux")
def test_every_number_is_read_twice_however_many_chunks_there_are(tmp_path: Path) -> None:
    n, d = 40, 100_000
    disk = kept(tmp_path, n, d)
    size = sum((tmp_path / file.path).stat().st_size for _, file in disk.files)

    before = bytes_read()
    median(Sent(disk.stored, "weights"), 4 * n * d // 16)
    read = bytes_read() - before

    wanted = size + n * 4 * d  # all three vectors once, one of them again
    buffers = 16 * n * 8192  # where each part's place in its file is looked up
    assert wanted <= read < 1.02 * wanted + buffers


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


class Changing(StoredUploads):
    """Uploads on disk, one of which changes when some numbers of chunk ``when`` are asked for."""

    def __init__(self, disk: Kept, change: Callable[[], object], when: int = 3) -> None:
        super().__init__(disk.store, disk.files)
        self.change, self.when = change, when

    def part(self, index: int, name: str, columns: slice) -> Tensor:
        if (index, columns.start) == (0, self.when * WIDTH):
            self.change()
        return super().part(index, name, columns)


def overwrite(path: Path, number: int) -> None:
    """Change one bit of a number of ``weights`` in place, and leave the file as old as it was."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) - 4 * (D - number)] ^= 1  # the vectors lie in the order of their names
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("number", [3 * WIDTH, 4 * WIDTH, D - 1])
def test_a_bit_that_changes_before_it_is_sorted_is_noticed(disk: Kept, number: int) -> None:
    uploads = Changing(disk, lambda: overwrite(disk.victim, number))
    with pytest.raises(RunFolderError) as caught:
        median(Sent(uploads, "weights"), CHUNK)
    assert caught.value.message == (
        f"{disk.victim}: not the file that the ledger names (SHA-256 differs)"
    )


def test_a_bit_that_changes_once_it_was_sorted_does_not_matter(disk: Kept) -> None:
    uploads = Changing(disk, lambda: overwrite(disk.victim, 3 * WIDTH - 1))
    assert torch.equal(
        median(Sent(uploads, "weights"), CHUNK), median(Sent(disk.uploads, "weights"))
    )


def another(disk: Kept) -> None:
    disk.store.save_upload(f"c-{CHANGED}", 1, disk.uploads[0])


def shorter(disk: Kept) -> None:
    os.truncate(disk.victim, disk.victim.stat().st_size - 4)


def without_it(disk: Kept) -> None:
    disk.store.save_upload(f"c-{CHANGED}", 1, Upload({}, 1.0))


def a_link(disk: Kept) -> None:
    disk.victim.rename(disk.victim.with_suffix(".old"))
    disk.victim.symlink_to(disk.victim.with_suffix(".old"))


def huge_header(disk: Kept) -> None:
    disk.victim.write_bytes(b"\xff" * 8 + disk.victim.read_bytes()[8:])


def wild_offset(disk: Kept) -> None:
    header = b'{"weights": {"data_offsets": [-1e400, 4]}}'
    disk.victim.write_bytes(len(header).to_bytes(8, "little") + header)


def far_offset(disk: Kept) -> None:
    header = b'{"weights": {"data_offsets": [%d, 4]}}' % 10**30
    disk.victim.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another, "not the file that the ledger names (SHA-256 differs)"),
        (shorter, "changed while it was being read"),
        (lambda disk: disk.victim.unlink(), "cannot be read: No such file or directory"),
        (a_link, "a link, or below one; links in a run folder are not followed"),
        (without_it, "cannot be read: 'weights'"),
        (huge_header, "cannot be read: 'utf-8' codec can't decode"),
        (wild_offset, "cannot be read: "),
        (far_offset, "cannot be read: "),
    ],
)
def test_a_file_that_becomes_another_is_refused_by_name(
    disk: Kept, change: Callable[[Kept], object], said: str
) -> None:
    with pytest.raises(RunFolderError) as caught:
        median(Sent(Changing(disk, lambda: change(disk)), "weights"), CHUNK)
    assert caught.value.message.startswith(f"{disk.victim}: {said}")


def test_a_change_that_is_undone_in_time_is_refused_all_the_same(disk: Kept) -> None:
    """Nothing is wrong with any file once it is noticed, so that none can be named."""

    class Briefly(StoredUploads):
        def part(self, index: int, name: str, columns: slice) -> Tensor:
            numbers = super().part(index, name, columns)
            return numbers + 1 if (index, columns.start) == (CHANGED, 3 * WIDTH) else numbers

    with pytest.raises(AggregationError) as caught:
        median(Sent(Briefly(disk.store, disk.files), "weights"), CHUNK)
    assert str(caught.value) == (
        "an upload has changed while it was averaged\n"
        "  hint: nothing of this round was averaged: see that nobody else writes there, then resume"
    )


def test_two_uploads_that_change_places_are_noticed(disk: Kept) -> None:
    """The same numbers in another order would be sorted to the same; they are refused still."""
    first, second = (disk.store.run_folder / disk.files[i][1].path for i in (1, 2))

    def swap() -> None:
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])

    with pytest.raises(RunFolderError, match=r"c-1\.safetensors: not the file that the ledger"):
        median(Sent(Changing(disk, swap), "weights"), CHUNK)

"""States that memory has no room for: the same bits from a file that nobody sees and none need."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pfl_lm.model.states import Row, StatesFile, TrunkStates

ROWS: list[Row] = [(1, 2, 3), (1, 2), (2, 1, 3), (5,), (1, 2, 3, 4)]
KEYS = [bytes([i]) for i in range(len(ROWS))]


def made(row: Row, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what might be a row's states, 7 numbers a token, some of them not numbers."""
    generator = torch.Generator().manual_seed(hash(row) % 2**31)
    states = torch.randn(len(row), 7, generator=generator)
    states[0, :3] = torch.tensor([float("nan"), -0.0, float("-inf")])
    return states.to(dtype)


def same(found: Tensor | None, wanted: Tensor) -> bool:
    assert found is not None
    as_bytes = [tensor.contiguous().view(torch.uint8) for tensor in (found, wanted)]
    return found.dtype == wanted.dtype and torch.equal(*as_bytes)


class Passes:
    """Walks over rows again and again, and counts what had to be made."""

    def __init__(self, states: TrunkStates) -> None:
        self.states = states
        self.n_made = 0

    def make(self, row: Row) -> Tensor:
        self.n_made += 1
        return made(row)

    def walk(self, rows: list[Row] = ROWS, depth: int = 1) -> int:
        """Return how many rows of this pass were not there."""
        before = self.n_made
        for row in rows:
            assert same(self.states.of(depth, row, self.make), made(row))
        return self.n_made - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    file = StatesFile(tmp_path)
    for key, row in zip(KEYS, ROWS, strict=True):
        file.append(key, made(row, dtype))
    for key, row in reversed(list(zip(KEYS, ROWS, strict=True))):
        assert same(file.read(key), made(row, dtype))
    file.append(b"seen from the side", made(ROWS[0], dtype).T)
    assert same(file.read(b"seen from the side"), made(ROWS[0], dtype).T)
    assert file.read(b"never met") is None


def test_what_was_read_is_nobody_elses(tmp_path: Path) -> None:
    file = StatesFile(tmp_path)
    file.append(KEYS[0], made(ROWS[0]))
    found = file.read(KEYS[0])
    assert found is not None
    found.zero_()
    assert same(file.read(KEYS[0]), made(ROWS[0]))


def test_every_row_is_made_once_with_a_file(tmp_path: Path) -> None:
    passes = Passes(TrunkStates(tmp_path, most_bytes=200))
    assert [passes.walk() for _ in range(3)] == [5, 0, 0]
    assert 0 < passes.states.n_bytes <= 200


def test_without_a_file_what_is_there_stays() -> None:
    """Oldest first, a pass over more rows than fit would find none of them."""
    passes = Passes(TrunkStates(most_bytes=200))  # the first two rows take 140
    assert [passes.walk() for _ in range(3)] == [5, 2, 2]


def test_a_row_is_its_tokens_in_order(tmp_path: Path) -> None:
    for states in (TrunkStates(), TrunkStates(tmp_path, most_bytes=0)):
        rows: list[Row] = [(1, 2), (2, 1), (12,), (1,), (), (0,), (0, 0), (2**40,), (258,)]
        for row in rows:
            states.of(1, row, lambda row: torch.full((1, 2), float(len(row) * 100 + sum(row))))
        for row in rows:
            found = states.of(1, row, lambda row: pytest.fail("made again"))
            assert found[0, 0] == torch.tensor(float(len(row) * 100 + sum(row)))


def test_another_depth_forgets_what_is_in_the_file_too(tmp_path: Path) -> None:
    passes = Passes(TrunkStates(tmp_path, most_bytes=100))
    assert [passes.walk(depth=depth) for depth in (1, 1, 2, 2, 1)] == [5, 0, 5, 0, 5]


def test_nothing_of_it_is_to_be_seen(tmp_path: Path) -> None:
    file = StatesFile(tmp_path)
    assert file._file is None  # nothing is opened before there is something to write
    file.append(KEYS[0], made(ROWS[0]))
    assert list(tmp_path.iterdir()) == []
    assert file._file is not None
    about = os.fstat(file._file.fileno())
    assert stat.S_IMODE(about.st_mode) == 0o600
    assert about.st_nlink == 0
    assert about.st_dev == tmp_path.stat().st_dev


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from pfl_lm.model.states import StatesFile
file = StatesFile(Path(sys.argv[1]))
file.append(b"k", torch.ones(50, 50))
assert file.read(b"k") is not None
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_of_a_process_that_was_killed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_it_is_closed_with_the_states(tmp_path: Path) -> None:
    file = StatesFile(tmp_path)
    file.append(KEYS[0], made(ROWS[0]))
    opened = file._file
    del file
    assert opened is not None
    assert opened.closed


def free(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    disk = SimpleNamespace(f_bavail=n_bytes // 4, f_frsize=4)
    monkeypatch.setattr("pfl_lm.model.states.os.fstatvfs", lambda fd: disk)


def test_it_takes_half_of_what_is_free_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 400)  # room for 200 bytes, and each row has 28 a token
    file = StatesFile(tmp_path)
    for key, row in zip(KEYS, ROWS, strict=True):
        file.append(key, made(row))
    assert [file.read(key) is not None for key in KEYS] == [True, True, False, True, False]
    assert file.n_bytes == (3 + 2 + 1) * 28


def test_it_leaves_that_half_free_whoever_else_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 4000)
    file = StatesFile(tmp_path)
    file.append(KEYS[0], made(ROWS[0]))
    free(monkeypatch, 2024)  # another run has filled the disk: 24 bytes above the half
    file.append(KEYS[3], made(ROWS[3]))  # 28
    assert file.read(KEYS[3]) is None
    assert same(file.read(KEYS[0]), made(ROWS[0]))
    free(monkeypatch, 2028)
    file.append(KEYS[3], made(ROWS[3]))
    assert same(file.read(KEYS[3]), made(ROWS[3]))


def broken(*given: Any) -> int:
    raise OSError(5, "Input/output error")


def test_a_write_that_fails_only_means_that_a_row_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(TrunkStates(tmp_path, most_bytes=0))
    passes.walk(ROWS[:2])
    pwrite = os.pwrite

    def half(fd: int, content: memoryview, at: int) -> int:
        if len(content) < 28 * len(ROWS[2]):
            broken()
        return pwrite(fd, content[:10], at)

    monkeypatch.setattr("pfl_lm.model.states.os.pwrite", half)
    assert [passes.walk() for _ in range(2)] == [3, 3]
    monkeypatch.undo()
    assert passes.walk() == 3  # it is not tried again
    file = passes.states._file
    assert file is not None
    assert file._file is not None
    assert os.fstat(file._file.fileno()).st_size == file.n_bytes == (3 + 2) * 28


def test_a_write_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, pread = os.pwrite, os.pread
    monkeypatch.setattr("pfl_lm.model.states.os.pwrite", lambda f, c, at: pwrite(f, c[:5], at))
    monkeypatch.setattr("pfl_lm.model.states.os.pread", lambda f, n, at: pread(f, min(n, 3), at))
    file = StatesFile(tmp_path)
    for key, row in zip(KEYS, ROWS, strict=True):
        file.append(key, made(row))
        assert same(file.read(key), made(row))


@pytest.mark.parametrize("fault", ["error", "bit", "end"])
def test_a_read_that_fails_only_means_that_a_row_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    passes = Passes(TrunkStates(tmp_path, most_bytes=0))
    assert [passes.walk(), passes.walk()] == [5, 0]
    file = passes.states._file
    assert file is not None
    assert file._file is not None
    if fault == "error":
        monkeypatch.setattr("pfl_lm.model.states.os.pread", broken)
    elif fault == "bit":
        os.pwrite(file._file.fileno(), b"\x55", file._of[next(iter(file._of))].start + 11)
    else:
        os.ftruncate(file._file.fileno(), file.n_bytes - 1)
    assert passes.walk() == {"error": 5, "bit": 1, "end": 1}[fault]
    monkeypatch.undo()
    assert passes.walk() == 0


def test_a_folder_that_takes_no_file_leaves_it_to_memory(tmp_path: Path) -> None:
    passes = Passes(TrunkStates(tmp_path / "missing", most_bytes=200))
    assert [passes.walk() for _ in range(3)] == [5, 2, 2]


def test_a_fork_neither_reads_nor_writes_its_parents_file(tmp_path: Path) -> None:
    passes = Passes(TrunkStates(tmp_path, most_bytes=0))
    passes.walk(ROWS[:3])
    go, gone = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go, 1)  # the parent has written more
        others: list[Row] = [(9, 9, 9, 9), (8, 8)]
        os._exit(0 if [passes.walk(ROWS[:3]), passes.walk(others)] == [3, 2] else 1)
    assert passes.walk() == 2
    os.write(gone, b"!")
    assert os.waitpid(child, 0)[1] == 0
    assert passes.walk() == 0

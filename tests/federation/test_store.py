"""State on disk: what goes in comes out to the bit, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pfl_lm.errors import RunFolderError
from pfl_lm.federation.messages import StateFile
from pfl_lm.federation.store import Store
from pfl_lm.files import write_atomically
from pfl_lm.methods import ClientState, ServerState, Upload

AWKWARD = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, float("inf"), float("nan"), 1 / 3])
SCALARS = {"adamw_step": 3.0, "third": 1 / 3, "large": 1e300}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run", {"A/b": "a-b", "c": "c"}, torch.device("cpu"))


def state(fill: float = 1.0) -> ClientState:
    return ClientState({"weights": torch.full((4,), fill), "v": AWKWARD.clone()}, dict(SCALARS))


def bits(tensor: Tensor) -> list[int]:
    return tensor.view(torch.int32).tolist()


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_clients_state_comes_back_bit_for_bit(store: Store) -> None:
    written = state()
    # A slice of a larger vector, as methods may keep one: only its own numbers are written.
    written.vectors["part"] = torch.arange(100.0)[10:20:2]

    file = store.save_client("A/b", 12, written)
    read = store.load_client(file)

    assert file.path == "clients/a-b/state-12.safetensors"
    assert read.scalars == SCALARS
    assert read.vectors.keys() == written.vectors.keys()
    for name, vector in written.vectors.items():
        assert read.vectors[name].dtype == torch.float32
        assert bits(read.vectors[name]) == bits(vector.contiguous())


def test_the_digest_is_that_of_the_file_and_the_same_each_time(store: Store) -> None:
    file = store.save_client("c", 1, state())
    content = (store.run_folder / file.path).read_bytes()
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert store.save_client("c", 1, state()) == file


def test_server_and_uploads_have_places_of_their_own(store: Store) -> None:
    server = store.save_server(3, ServerState({"global_weights": AWKWARD}))
    upload = store.save_upload("A/b", 3, Upload({"weights": AWKWARD}, 5, {"loss": 0.5}))
    empty = store.save_upload("c", 3, Upload({}, 0.0))

    assert files_in(store.run_folder) == [
        "server/state-3.safetensors",
        "uploads/3/a-b.safetensors",
        "uploads/3/c.safetensors",
    ]
    assert bits(load_file(store.run_folder / server.path)["global_weights"]) == bits(AWKWARD)
    with safe_open(store.run_folder / upload.path, "pt") as file:
        assert file.metadata()["scalars"] == '{"loss": 0.5, "weight": 5}'
    assert load_file(store.run_folder / empty.path) == {}


def test_another_file_than_the_ledger_names_is_refused(store: Store) -> None:
    file = store.save_client("c", 1, state())
    store.save_client("c", 1, state(fill=2.0))
    with pytest.raises(RunFolderError, match="not the file that the ledger names"):
        store.load_client(file)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(store: Store, kept: int) -> None:
    file = store.save_client("c", 1, state())
    path = store.run_folder / file.path
    path.write_bytes(path.read_bytes()[:kept])

    with pytest.raises(RunFolderError, match="SHA-256 differs"):
        store.load_client(file)
    truncated = StateFile(file.path, hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(RunFolderError, match=r"state-1\.safetensors: cannot be read"):
        store.load_client(truncated)


def test_a_file_that_is_gone_is_named(store: Store) -> None:
    with pytest.raises(RunFolderError, match=r"clients/c/state-1\.safetensors: cannot be read"):
        store.load_client(StateFile("clients/c/state-1.safetensors", "0" * 64))


def test_discard_removes_files_and_the_folders_they_leave_empty(store: Store) -> None:
    old, new = store.save_client("c", 1, state()), store.save_client("c", 2, state())
    upload = store.save_upload("c", 1, Upload({}, 0.0))

    store.discard([old.path, upload.path, "uploads/1/never-written.safetensors"])

    assert files_in(store.run_folder) == [new.path]
    assert not (store.run_folder / "uploads" / "1").exists()
    assert store.run_folder.exists()


# --- a disk that is full ----------------------------------------------------------------------


def no_space(*args: Any, **options: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_sweep_closes_up_what_an_interrupted_removal_left(store: Store) -> None:
    """Killed after a file was removed and before its folder was."""
    kept = store.save_client("c", 1, state())
    for name in ("uploads/1", "clients/a-b"):
        (store.run_folder / name).mkdir(parents=True)
    assert store.sweep([kept]) == []
    left = sorted(p.relative_to(store.run_folder).as_posix() for p in store.run_folder.rglob("*"))
    assert left == ["clients", "clients/c", kept.path]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new_one(
    store: Store, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    old = store.save_client("c", 1, state())
    with monkeypatch.context() as patch:
        patch.setattr(os if broken == "fsync" else Path, broken, no_space)
        with pytest.raises(RunFolderError) as caught:
            store.save_client("c", 1, state(fill=2.0))

    path = store.run_folder / old.path
    assert str(caught.value) == (
        f"{path}: cannot be written: No space left on device\n"
        "  hint: make room on this disk; what was committed before is intact"
    )
    assert files_in(store.run_folder) == [old.path]
    assert store.load_client(old).vectors["weights"].tolist() == [1.0] * 4


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_no_new_file_under_its_final_name(
    store: Store, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(os if broken == "fsync" else Path, broken, no_space)
    with pytest.raises(RunFolderError):
        store.save_upload("c", 1, Upload({"weights": AWKWARD}, 1.0))
    assert files_in(store.run_folder) == []


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file and folder that is synced, as it is called at that moment."""
    found, fsync = [], os.fsync

    def watched(descriptor: int) -> None:
        found.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="takes Linux")
@pytest.mark.parametrize("size", [0, 10, 100_000])  # below and above what Python buffers
def test_a_file_gets_its_name_only_once_all_of_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, synced: list[Path]
) -> None:
    path, content, sizes = tmp_path / "file", b"x" * size, []
    replace = Path.replace

    def replaced(self: Path, target: Path) -> Path:
        sizes.append(self.stat().st_size)
        assert synced == [self]
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replaced)
    digest = write_atomically(path, content)

    assert sizes == [size]
    assert synced[1:] == [tmp_path]
    assert path.read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="takes Linux")
def test_a_new_folder_is_on_disk_before_anything_in_it(tmp_path: Path, synced: list[Path]) -> None:
    """A file that is synced in a folder that is not would be lost with it."""
    a, b = tmp_path / "a", tmp_path / "a" / "b"
    write_atomically(b / "one", b"1")
    assert [path for path in synced if not path.name.startswith(".one")] == [tmp_path, a, b]
    synced.clear()
    write_atomically(b / "two", b"2")
    assert [path for path in synced if not path.name.startswith(".two")] == [b]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunFolderError) as caught:
        write_atomically(tmp_path / "taken" / "x", b"")
    assert str(caught.value).endswith("  hint: see that the folder can be written to")

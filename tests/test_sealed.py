"""Files of a run folder: no link is followed, no name leads out, only ordinary files are read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pfl_lm.errors import RunFolderError
from pfl_lm.sealed import open_sealed, read_sealed


def test_only_ordinary_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "big").write_bytes(b"x" * 11)
    (tmp_path / "file").write_bytes(b"x" * 10)
    (tmp_path / "folder" / "in").write_bytes(b"in")

    assert read_sealed(tmp_path, "file", 10) == b"x" * 10
    assert read_sealed(tmp_path, "folder/in", 10) == b"in"
    for name, said in [
        ("pipe", "not an ordinary file"),
        ("folder", "not an ordinary file"),
        ("big", "larger than 10 bytes"),
        ("nope", "cannot be read: No such file"),
        ("file/in", "a link, or below one"),
    ]:
        with pytest.raises(RunFolderError, match=said):
            read_sealed(tmp_path, name, 10)


@pytest.mark.parametrize(
    "name",
    [
        *("../secret", "folder/../../secret", "/etc/hostname", "", "./x"),
        *("folder/", "folder//x", "..", "a\0b", "\ud800"),
    ],
)
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "folder").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")

    with pytest.raises(RunFolderError, match="is not a name within a run folder"):
        read_sealed(run, name, 100)


@pytest.mark.parametrize("at", ["folder", "folder/file"])
def test_no_link_is_followed(at: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("secret")
    run = tmp_path / "run"
    (run / at).parent.mkdir(parents=True)
    (run / at).symlink_to(outside if at == "folder" else outside / "file")

    with pytest.raises(RunFolderError, match="links in a run folder are not followed"):
        read_sealed(run, "folder/file", 100)


def test_a_file_with_a_hole_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(2**40)

    with pytest.raises(RunFolderError, match="larger than 1099511627775 bytes"):
        read_sealed(tmp_path, "file", 2**40 - 1)


def test_a_file_is_read_piece_by_piece(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")

    with open_sealed(tmp_path, "file", 10) as (file, size):
        assert (size, file.read(4), file.read(10)) == (10, b"0123", b"456789")
    with (
        pytest.raises(RunFolderError, match="file: cannot be read: Input/output error"),
        open_sealed(tmp_path, "file", 10),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(RunFolderError, match="larger than 9 bytes"):
        open_sealed(tmp_path, "file", 9).__enter__()


def test_a_file_that_grows_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    status = os.fstat

    def smaller(descriptor: int) -> os.stat_result:
        return os.stat_result((*status(descriptor)[:6], 9, *status(descriptor)[7:]))

    monkeypatch.setattr(os, "fstat", smaller)
    with pytest.raises(RunFolderError, match="file: changed while it was being read"):
        read_sealed(tmp_path, "file", 10)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x" * 11)
    before = len(list(Path("/proc/self/fd").iterdir()))

    for name in ["folder/file", "folder/nope", "folder", "../x", "folder/../x", "nope/file"] * 20:
        with pytest.raises(RunFolderError):
            read_sealed(tmp_path, name, 10)

    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1

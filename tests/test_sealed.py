"""Files of a run folder: no link is followed, no name leads out, only ordinary files are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pfl_lm.errors import RunFolderError
from pfl_lm.sealed import read_sealed


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


@pytest.mark.parametrize("name", ["../secret", "folder/../../secret", "/etc/hostname", "", "./x"])
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


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x" * 11)
    before = len(list(Path("/proc/self/fd").iterdir()))

    for name in ["folder/file", "folder/nope", "folder", "../x", "folder/../x", "nope/file"] * 20:
        with pytest.raises(RunFolderError):
            read_sealed(tmp_path, name, 10)

    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1

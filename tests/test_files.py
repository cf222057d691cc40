"""Files are opened if they are ordinary ones, and nothing else is waited for."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pfl_lm.files import open_ordinary


def test_an_ordinary_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a\r\nb")
    (tmp_path / "link").symlink_to("file")

    for name in ("file", "link"):
        with open_ordinary(tmp_path / name) as file:
            assert file.read() == b"a\r\nb"
        assert file.closed


def test_nothing_else_is_opened_and_no_descriptor_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        before = len(list(Path("/proc/self/fd").iterdir()))

        for name in ("pipe", "link", "/dev/zero", "/dev/null") * 5:
            with pytest.raises(OSError, match="not an ordinary file"):
                open_ordinary(Path(name))
        with pytest.raises(IsADirectoryError):
            open_ordinary(Path("folder"))
        for name in ("socket", "nope", "x" * 300):
            with pytest.raises(OSError):
                open_ordinary(Path(name))

    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1

"""Folders of client files that hold more than files, or other files than they seem."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile.hostile import names, workplace
from tests.hostile.watched import Watched, examples, report
from tests.tiny import tiny_recipe

ROWS = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(4)).encode()
ENDINGS = [".jsonl", ".json", ".csv", ".parquet", ".JSONL", "", ".txt", ".jsonl.gz"]

Maker = Callable[[Path], object]


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """The current folder, with a recipe whose data are the files in `clients/`."""
    work = workplace(tmp_path)
    (tmp_path / "outside.jsonl").write_text('{"text": "DECOY"}\n' * 4)
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "outside.jsonl", tmp_path / "folder" / "x.jsonl")
    settings = {"data.path": "clients", "backbone.model_name_or_path": "./model"}
    tiny_recipe(work, **settings, **{"data.split_column": None, "runtime.output_dir": "runs"})
    monkeypatch.chdir(work)
    return Watched(tmp_path)


def _file(content: bytes = ROWS, mode: int = 0o644) -> Maker:
    def make(path: Path) -> None:
        path.write_bytes(content)
        path.chmod(mode)

    return make


def _link(to: str) -> Maker:
    return lambda path: path.symlink_to(to)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _hard_link(path: Path) -> None:
    path.hardlink_to(Path("clients.kept").absolute())


def _folder_of_files(path: Path) -> None:
    path.mkdir()
    _file()(path / "inner.jsonl")


def _with_a_hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**27)


MAKERS: list[Maker] = [
    *(_file(), _file(), _file(), _file(b""), _file(b"\n"), _file(ROWS[:-9]), _file(b"\0" * 99)),
    *(_file(ROWS, 0), _file(ROWS, 0o200), _file(b"PAR1" + b"\xff" * 40 + b"PAR1")),
    *(_link("../outside.jsonl"), _link("../../../outside.jsonl"), _link("/etc/passwd")),
    *(
        _link("nowhere"),
        _link("."),
        _link(".."),
        _link("/"),
        _link("/dev/zero"),
        _link("/dev/stdin"),
    ),
    *(_link("../../../folder"), _link("ok.jsonl"), _link("loop.jsonl"), _link("/proc/self/mem")),
    *(os.mkfifo, _socket, Path.mkdir, _folder_of_files, _hard_link, _with_a_hole),
]
entries = st.lists(st.tuples(names, st.sampled_from(ENDINGS), st.sampled_from(MAKERS)), max_size=3)


def test_folders_with_other_things_in_them(clients: Watched) -> None:
    folder = Path("clients")

    @examples(120)
    @given(entries, st.booleans())
    def check(made: list[tuple[str, str, Maker]], with_good: bool) -> None:
        folder.mkdir()
        Path("clients.kept").write_bytes(ROWS)
        if with_good:
            (folder / "ok.jsonl").write_bytes(ROWS)
        for name, ending, maker in made:
            with suppress(OSError, ValueError):  # no name for a file, or there already
                maker(folder / (name + ending))
        try:
            _, stdout, stderr = clients.run("validate", "recipe.yaml")
        finally:
            shutil.rmtree(folder)
        assert "DECOY" not in stdout + stderr
        assert "root:" not in stdout + stderr

    check()
    report(clients, 100)


DIRECTLY: dict[str, Maker] = {
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a device": _link("/dev/zero"),
    "a terminal": _link("/dev/tty"),
    "what only root may read": _link("/proc/kcore"),
    "memory": _link("/proc/self/mem"),
    "a hole": _with_a_hole,
    "a loop": _link("data.jsonl"),
}


@pytest.mark.parametrize("case", DIRECTLY)
@pytest.mark.parametrize("key", ["data.path", "recipe", "backbone.model_name_or_path"])
def test_what_is_no_file_of_rows(clients: Watched, case: str, key: str) -> None:
    DIRECTLY[case](Path("data.jsonl"))
    if key == "recipe":
        code, _, _ = clients.run("validate", "data.jsonl")
    else:
        code, _, _ = clients.run("validate", "recipe.yaml", f"{key}=./data.jsonl")

    assert code == 2

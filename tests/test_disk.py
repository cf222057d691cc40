"""A disk that fills up, or cannot be written to, while a run goes on.

Wherever it happens, the user is told what to do, no file stands under its final name half written,
and what the ledger has committed can still be read. Once there is room the same run goes on, and
ends as one that always had it.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import os
import re
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import pfl_lm.federation.schema
import pfl_lm.finetune
from pfl_lm.cli.app import app
from pfl_lm.errors import RunFolderError
from pfl_lm.federation.ledger import Ledger
from pfl_lm.recipe.yaml12 import read_yaml
from tests.same import check_same
from tests.tiny import tiny_recipe

ROOM = "make room on this disk; what was committed before is intact"
WRITABLE = "see that the folder can be written to"
ONE_ROUND = {"federation.rounds": 1}


def check_what_is_left(folder: Path) -> None:
    """Read every file that stands under its final name, and all that the ledger has committed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.endswith(".part")]
    for path in files:
        match path.suffix:
            case ".safetensors":
                load_file(path)
            case ".json":
                json.loads(path.read_text(encoding="utf-8"))
            case ".csv":
                with path.open(newline="") as file:
                    assert all(None not in row.values() for row in csv.DictReader(file))
            case ".yaml":
                assert read_yaml(path.read_bytes(), path.name).data["name"] == "tiny"
            case ".md":  # a card ends with the recipe it shows
                assert path.read_text(encoding="utf-8").endswith("</details>\n")
            case _:
                assert path.name.startswith(("federation.sqlite", "events.out.tfevents")), path
    ledger = folder / "federation.sqlite"
    if not ledger.exists() or not ledger.stat().st_size:
        return
    with closing(sqlite3.connect(ledger)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        last = "SELECT state_path, state_sha256 FROM {} WHERE round = (SELECT max(round) FROM {})"
        tables = connection.execute("SELECT name FROM sqlite_schema WHERE name = 'turns'")
        for name in ("turns", "rounds") if tables.fetchall() else ():
            for path, sha256 in connection.execute(last.format(name, name)).fetchall():
                content = (folder / path).read_bytes()
                assert hashlib.sha256(content).hexdigest() == sha256


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one round that always had room. Read it only."""
    place = tmp_path_factory.mktemp("expected")
    assert run(tiny_recipe(place, **ONE_ROUND)) == (0, "")
    return place / "runs" / "tiny"


def check_goes_on(
    recipe: Path, expected: Path, *overrides: str, folder: Path | None = None
) -> None:
    """Go on with a run that has failed, now that nothing is in its way."""
    assert run(recipe, *overrides, "--resume") == (0, "")
    check_same(folder or recipe.parent / "runs" / "tiny", expected, apart=("logs/",))


# --- any single write -----------------------------------------------------------------------------


class FailsFrom:
    """Stands in for a system call: from its k-th call on it fails, as on a full disk."""

    def __init__(self, call: Callable[..., Any], k: float, code: int) -> None:
        self.call, self.k, self.code = call, k, code
        self.calls = 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls >= self.k:
            raise OSError(self.code, os.strerror(self.code))
        return self.call(*given, **named)


def run(recipe: Path, *overrides: str) -> tuple[int, str]:
    """Run the command line; return its exit code and what it said on stderr."""
    result = CliRunner().invoke(app, ["finetune", str(recipe), *overrides])
    return result.exit_code, result.stderr


def run_failing(
    tmp_path: Path, what: str, k: float, code: int = errno.ENOSPC, *overrides: str
) -> tuple[int, str, int]:
    """Run with ``os.fsync`` or ``Path.replace`` failing from the k-th call on; count the calls."""
    recipe = tiny_recipe(tmp_path, **ONE_ROUND)
    owner: Any = os if what == "fsync" else Path
    fails = FailsFrom(getattr(owner, what), k, code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, what, lambda *given, **named: fails(*given, **named))
        exit_code, said = run(recipe, *overrides)
    return exit_code, said, fails.calls


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How often a run that ends well calls each."""
    found = {}
    for what in ("fsync", "replace"):
        code, said, n = run_failing(tmp_path_factory.mktemp(what), what, math.inf)
        assert (code, said) == (0, "")
        found[what] = n
    assert found["replace"] >= 20
    assert found["fsync"] > 2 * found["replace"]  # each file, its folder, and that of a new folder
    return found


@pytest.mark.parametrize("share", [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.45, 0.6, 0.8, 0.95, 1])
@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_a_full_disk_at_any_write(
    tmp_path: Path, calls: dict[str, int], expected: Path, what: str, share: float
) -> None:
    k = 1 + round(share * (calls[what] - 1))
    code, said, _ = run_failing(tmp_path, what, k)
    check_says_full(code, said, tmp_path / "runs")
    check_what_is_left(tmp_path / "runs" / "tiny")
    check_goes_on(tmp_path / "recipe.yaml", expected)


def check_says_full(code: int, said: str, runs: Path) -> None:
    assert code == 2
    assert said.startswith(f"{runs}{os.sep}")
    assert said.endswith(f": cannot be written: No space left on device\n  hint: {ROOM}\n")


def test_a_disk_that_becomes_read_only(
    tmp_path: Path, calls: dict[str, int], expected: Path
) -> None:
    code, said, _ = run_failing(tmp_path, "replace", calls["replace"] // 2, errno.EROFS)
    assert code == 2
    assert said.endswith(f": cannot be written: Read-only file system\n  hint: {WRITABLE}\n")
    check_what_is_left(tmp_path / "runs" / "tiny")
    check_goes_on(tmp_path / "recipe.yaml", expected)


@pytest.mark.parametrize("share", [0, 0.3, 0.7])
def test_a_disk_that_is_full_again_when_the_run_goes_on(
    tmp_path: Path, calls: dict[str, int], expected: Path, share: float
) -> None:
    """Full in the middle; then, three times over, a little further on."""
    folder = tmp_path / "runs" / "tiny"
    run_failing(tmp_path, "replace", calls["replace"] // 3)
    for k in (1, 2, 1 + round(share * calls["replace"] // 2)):
        code, said, _ = run_failing(tmp_path, "replace", k, errno.ENOSPC, "--resume")
        check_says_full(code, said, tmp_path / "runs")
        check_what_is_left(folder)
    check_goes_on(tmp_path / "recipe.yaml", expected)


@pytest.mark.parametrize("k", [1, 2, 3, 11, 13])  # config, weights, card; global's; the index
def test_a_disk_that_is_full_while_adapters_are_exported(
    tmp_path: Path, expected: Path, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, fails = (
        tiny_recipe(tmp_path, **ONE_ROUND),
        FailsFrom(Path.replace, math.inf, errno.ENOSPC),
    )
    exporting = pfl_lm.finetune.export_adapters

    def export(*given: Any) -> Any:
        fails.k = fails.calls + k
        return exporting(*given)

    with monkeypatch.context() as patch:
        patch.setattr(pfl_lm.finetune, "export_adapters", export)
        patch.setattr(Path, "replace", lambda *given: fails(*given))
        code, said = run(recipe)
    check_says_full(code, said, tmp_path / "runs" / "tiny")
    assert ("/adapters/" in said) == (k < 10)
    check_what_is_left(tmp_path / "runs" / "tiny")
    check_goes_on(recipe, expected)


@pytest.mark.parametrize("spare", [0, 2, 4, 8])
def test_a_ledger_that_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path, spare: int
) -> None:
    """Allow the ledger a few small pages beyond those of its empty tables."""
    connect, create = sqlite3.connect, Ledger.__init__

    def small(*given: Any, **named: Any) -> sqlite3.Connection:
        connection = connect(*given, **named)
        connection.execute("PRAGMA page_size = 512")
        return connection

    def created(self: Ledger, path: Path) -> None:
        create(self, path)
        [(pages,)] = self._connection.execute("PRAGMA page_count")
        self._connection.execute(f"PRAGMA max_page_count = {pages + spare}").fetchall()

    recipe = tiny_recipe(tmp_path, **ONE_ROUND)
    with monkeypatch.context() as patch:
        patch.setattr(pfl_lm.federation.schema.sqlite3, "connect", small)
        patch.setattr(Ledger, "__init__", created)
        code, said = run(recipe)
    ledger = tmp_path / "runs" / "tiny" / "federation.sqlite"
    full = f"{ledger}: cannot be written: database or disk is full\n  hint: {ROOM}\n"
    assert (code, said) == (2, full)
    check_what_is_left(ledger.parent)
    check_goes_on(recipe, expected)


# --- a real disk ----------------------------------------------------------------------------------


Disk = Callable[[str], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mount a disk in memory with the options given; skip where that is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a file system cannot be mounted here: it takes Linux and its root")
        return folder

    yield mount
    if folder.is_mount():  # nothing of the run may still be open
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


@pytest.mark.parametrize("size", [8, 32, 64, 112, 128, 160, 192, 224, 256, 320, 384])
def test_a_disk_that_is_too_small(tmp_path: Path, disk: Disk, expected: Path, size: int) -> None:
    check_too_small(tiny_recipe(tmp_path, **ONE_ROUND), disk(f"size={size}k"), expected)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("size", [160, 384])
def test_a_disk_that_is_too_small_for_tensorboard(tmp_path: Path, disk: Disk, size: int) -> None:
    """Its writer's thread says so in its own way; the run must still end in ours."""
    pytest.importorskip("tensorboard", reason='pip install "pfl-lm[tracking]"')
    changes = {**ONE_ROUND, "runtime.tracking": "tensorboard"}
    (tmp_path / "expected").mkdir()
    assert run(tiny_recipe(tmp_path / "expected", **changes)) == (0, "")
    expected = tmp_path / "expected" / "runs" / "tiny"
    recipe = tiny_recipe(tmp_path, **changes)
    check_too_small(recipe, disk(f"size={size}k"), expected)


def check_too_small(recipe: Path, place: Path, expected: Path) -> None:
    code, said = run(recipe, f"runtime.output_dir={place}")
    assert code == 2
    message, hint = said.splitlines()[-2:]
    assert re.match(rf"{place}/tiny/\S+: cannot be written: ", message)
    assert hint.startswith("  hint: ")
    assert "room" in hint
    subprocess.run(["mount", "-o", "remount,size=4m", str(place)], check=True)  # as the hint says
    check_what_is_left(place / "tiny")
    check_goes_on(recipe, expected, f"runtime.output_dir={place}", folder=place / "tiny")


def test_a_disk_that_is_large_enough(tmp_path: Path, disk: Disk) -> None:
    recipe = tiny_recipe(tmp_path, **ONE_ROUND)
    place = disk("size=1m")
    assert run(recipe, f"runtime.output_dir={place}") == (0, "")
    check_what_is_left(place / "tiny")


def test_a_read_only_disk_is_found_before_anything_is_loaded(tmp_path: Path, disk: Disk) -> None:
    recipe = tiny_recipe(tmp_path)
    place = disk("ro")
    assert run(recipe, f"runtime.output_dir={place}") == (2, not_writable(place / "tiny", place))


def test_a_folder_without_permission_is_found_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert run(recipe) == (2, not_writable(tmp_path / "runs" / "tiny", tmp_path))
    assert not (tmp_path / "runs").exists()


def not_writable(folder: Path, above: Path) -> str:
    other = "choose another `name` or `runtime.output_dir`"
    return f"{folder}: cannot be made, {above} is not writable\n  hint: {other}\n"


def test_a_ledger_on_a_read_only_disk_says_so(disk: Disk) -> None:
    place = disk("ro")
    with pytest.raises(RunFolderError) as caught:
        Ledger(place / "federation.sqlite")
    assert caught.value.message.startswith(f"{place}/federation.sqlite: cannot be written: ")
    assert caught.value.hint == f"{WRITABLE} and that its disk has room"

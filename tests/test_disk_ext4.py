"""A real file system that turns read-only in mid-run, or holds files that nobody may change.

Whatever it is, the user is told, and once it is put right the run goes on and ends as ever.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pfl_lm.export.adapters
from pfl_lm.cli.app import app
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.store import Store
from tests.disks import Ext4, NoDiskError
from tests.same import check_same
from tests.tiny import tiny_recipe


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Ext4]:
    try:
        made = Ext4(tmp_path)
    except NoDiskError as error:
        pytest.skip(str(error))
    yield made
    made.unmount()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("expected")
    assert cli("finetune", str(tiny_recipe(place))) == (0, "")
    return place / "runs" / "tiny"


def cli(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*arguments])
    return result.exit_code, result.stderr


@contextmanager
def at(owner: Any, name: str, k: int, do: Callable[[], object]) -> Iterator[None]:
    """Do something once, before the ``k``-th call of a method."""
    call, calls = getattr(owner, name), [0]

    def watched(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == k:
            do()
        return call(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield
    assert calls[0] >= k


def on(disk: Ext4, place: Path) -> tuple[Path, Path]:
    """Return a recipe whose run lies on a disk, and that run's folder."""
    recipe = tiny_recipe(place, **{"runtime.output_dir": str(disk.folder)})
    return recipe, disk.folder / "tiny"


LEDGER_TOO = " and that its disk has room"
"""A ledger does not say which it is."""


@pytest.mark.parametrize(
    ("owner", "name", "k", "what"),
    [
        (Ledger, "_commit", 5, r"federation\.sqlite: cannot be written: disk I/O error"),
        (Store, "_write_behind", 3, r"clients/bob/state-1\.safetensors: "),
        (Store, "discard", 2, r"server/state-0\.safetensors: "),
        (Path, "replace", 12, r"\S+: "),
        (pfl_lm.export.adapters, "export_adapter", 2, r"adapters/bob/adapter_config\.json: "),
    ],
    ids=["commit", "state", "removal", "replace", "export"],
)
def test_a_disk_that_turns_read_only_in_mid_run(
    tmp_path: Path, disk: Ext4, expected: Path, owner: Any, name: str, k: int, what: str
) -> None:
    recipe, folder = on(disk, tmp_path)
    with at(owner, name, k, disk.turn_read_only):
        code, said = cli("finetune", str(recipe))
    assert code == 2
    if what.endswith(": "):
        what += "cannot be written: Read-only file system"
    hint = f"  hint: see that the folder can be written to({LEDGER_TOO})?\n"
    assert re.fullmatch(f"{re.escape(str(folder))}/{what}\n{hint}", said), said
    for again in (("finetune", str(recipe), "--resume"), ("resume", str(folder))):
        assert cli(*again) == (
            2,
            f"{folder}/federation.lock: cannot be written: Read-only file system\n"
            "  hint: see that the folder can be written to\n",
        )
    disk.repair()
    assert cli("finetune", str(recipe), "--resume") == (0, "")
    check_same(folder, expected)


@pytest.mark.parametrize(
    ("locked", "what"),
    [
        ("federation.sqlite", "federation.sqlite: {}attempt to write a readonly database"),
        ("clients/alice", "clients/alice/state-2.safetensors: {}Operation not permitted"),
        (
            "clients/alice/state-1.safetensors",
            "clients/alice/state-1.safetensors: {}Operation not permitted",
        ),
        ("server", "server/state-2.safetensors: {}Operation not permitted"),
        (".", "federation.sqlite: {}unable to open database file"),
    ],
)
def test_what_nobody_may_change_is_named(
    tmp_path: Path, disk: Ext4, expected: Path, locked: str, what: str
) -> None:
    """An immutable file stands for one without permission: root, too, may not change it."""
    recipe, folder = on(disk, tmp_path)
    with at(ClientSide, "_train", 4, interrupt):  # alice's turn of round 2
        assert cli("finetune", str(recipe)) == (130, "interrupted\n")
    subprocess.run(["chattr", "+i", str(folder / locked)], check=True)
    try:
        code, said = cli("finetune", str(recipe), "--resume")
    finally:
        subprocess.run(["chattr", "-i", str(folder / locked)], check=True)
    hint = "see that the folder can be written to"
    hint += LEDGER_TOO if "sqlite" in what else ""
    assert code == 2
    assert said == f"{folder}/{what.format('cannot be written: ')}\n  hint: {hint}\n"
    assert cli("finetune", str(recipe), "--resume") == (0, "")
    check_same(folder, expected)


def interrupt() -> None:
    raise KeyboardInterrupt

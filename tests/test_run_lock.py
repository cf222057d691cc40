"""One process at a time in a run folder, and starts that came to nothing."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from pfl_lm.errors import RunFolderError
from pfl_lm.federation.lock import run_lock
from pfl_lm.federation.opening import begun
from pfl_lm.finetune import finetune
from pfl_lm.recipe import load_recipe
from pfl_lm.resume import has_begun
from tests.interruptions import cli, go_on, held_by_another, stopped, whole
from tests.same import check_same, files_in
from tests.tiny import tiny_recipe


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """A fork stands for it: the lock is not this process's own."""
    folder = stopped(tmp_path, 20)
    with held_by_another(folder) as child:
        code, _, said = cli("resume", str(folder))
        assert code == 2
        pattern = (
            rf"{re.escape(str(folder))}: another process is at work in this run folder "
            rf"\(process {child} on .+\)\n  hint: wait until it is done, or stop it; a process "
            r"that was killed holds no lock\n"
        )
        assert re.fullmatch(pattern, said), said
    assert not (folder / "federation.lock").exists()


def test_the_lock_of_a_process_that_was_killed_holds_nobody_up(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 20)
    (folder / "federation.lock").write_text('{"host": "here", "pid": 1}')
    go_on(folder)
    check_same(folder, whole(tmp_path / "b"))


def test_a_lock_that_cannot_be_removed_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that has become read-only a run says so; the lock itself is gone all the same."""

    def read_only(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(RunFolderError, match="what ended the run"), run_lock(tmp_path):
        raise RunFolderError("what ended the run")
    monkeypatch.undo()
    assert (tmp_path / "federation.lock").exists()
    child = os.fork()
    if child == 0:  # another process
        with run_lock(tmp_path):
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_start_that_was_killed_does_not_occupy_the_folder(tmp_path: Path) -> None:
    folder = stopped(tmp_path, 2)
    (folder / "federation.lock").touch()  # a killed process leaves it
    unfinished = folder / ".recipe.yaml.123.part"
    unfinished.write_text("name: ti")
    assert not has_begun(folder)
    finetune(load_recipe(tmp_path / "recipe.yaml"))
    assert not unfinished.exists()


def test_a_start_that_has_failed_does_not_either(tmp_path: Path) -> None:
    """Unlike one that was killed it takes its lock away with it."""
    for k in range(1, 4):
        folder = stopped(tmp_path / str(k), k)
        assert not has_begun(folder)
        assert not (folder / "federation.lock").exists()
        finetune(load_recipe(tmp_path / str(k) / "recipe.yaml"))


def test_of_two_that_begin_at_once_the_later_is_refused(tmp_path: Path) -> None:
    """Both have found the folder free; the first has been killed when the second has its lock."""
    folder = stopped(tmp_path, 20)
    loaded = load_recipe(tmp_path / "recipe.yaml")
    before = files_in(folder)
    with pytest.raises(RunFolderError) as caught, begun(loaded, {}, []):
        pytest.fail("a second run has begun")
    assert str(caught.value) == (
        f"{folder}: another process has begun a run here in the meantime\n"
        f"  hint: go on with it by `pfl-lm resume {folder}`"
    )
    assert files_in(folder) == before


def test_a_recipe_that_somebody_has_put_there_does(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("mine")
    with pytest.raises(RunFolderError, match="already holds a run"):
        finetune(load_recipe(tiny_recipe(tmp_path)))
    assert (folder / "recipe.yaml").read_text() == "mine"

"""A run that is stopped at any commit and gone on with ends as one that never was."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pfl_lm.federation.opening
import pfl_lm.federation.store
from pfl_lm.cli.app import app
from pfl_lm.errors import DataError, PflError, RecipeError, RunFolderError
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.lock import run_lock
from pfl_lm.federation.opening import begun
from pfl_lm.finetune import finetune
from pfl_lm.methods import METHODS
from pfl_lm.recipe import load_recipe
from pfl_lm.resume import has_begun, run_clients, run_recipe
from tests.same import check_same, facts_in, files_in
from tests.tiny import client_rows, save_model, tiny_recipe, write_jsonl

CHANGES: dict[str, Any] = {"federation.fraction_train": 0.7, "adapter.lora_dropout": 0.2}


class Killed(BaseException):
    """What a process that ends sees of it, in a test."""


@contextmanager
def killed_at(k: int) -> Iterator[list[int]]:
    """End the body at the ``k``-th commit or file, before it is made; count them."""
    seen = [0]

    def counted(call: Any) -> Any:
        def counting(*given: Any, **named: Any) -> Any:
            seen[0] += 1
            if seen[0] >= k:
                raise Killed
            return call(*given, **named)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "_commit", counted(Ledger._commit))
        for module in (pfl_lm.federation.store, pfl_lm.federation.opening):
            patch.setattr(module, "write_atomically", counted(module.write_atomically))
        yield seen


def stopped(folder: Path, k: int, **changes: Any) -> Path:
    """Start a run, end it at the ``k``-th commit, and return its folder."""
    folder.mkdir(exist_ok=True)
    loaded = load_recipe(tiny_recipe(folder, **changes))
    with killed_at(k), pytest.raises(Killed):
        finetune(loaded)
    return loaded.run_folder


def go_on(folder: Path, rounds: int | None = None) -> Path:
    """Go on with a run, or begin it if it has not begun."""
    if not has_begun(folder):
        return finetune(load_recipe(folder.parents[1] / "recipe.yaml")).folder
    return finetune(run_recipe(folder, rounds), resume=True).folder


def whole(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return finetune(load_recipe(tiny_recipe(folder, **changes))).folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """One run without an interruption, and how many commits it makes. Read it only."""
    with killed_at(10**6) as seen:
        folder = whole(tmp_path_factory.mktemp("whole"), **CHANGES)
    return folder, seen[0]


@pytest.mark.parametrize("share", [i / 12 for i in range(13)])
def test_stopped_anywhere_it_ends_the_same(
    tmp_path: Path, uninterrupted: tuple[Path, int], share: float
) -> None:
    expected, n_commits = uninterrupted
    assert n_commits > 30
    folder = stopped(tmp_path, 1 + round(share * (n_commits - 1)), **CHANGES)
    check_same(go_on(folder), expected)


@pytest.mark.slow
def test_stopped_at_every_commit_it_ends_the_same(
    tmp_path: Path, uninterrupted: tuple[Path, int]
) -> None:
    expected, n_commits = uninterrupted
    for k in range(1, n_commits + 1):
        check_same(go_on(stopped(tmp_path / str(k), k, **CHANGES)), expected)


def test_stopped_again_and_again_it_ends_the_same(
    tmp_path: Path, uninterrupted: tuple[Path, int]
) -> None:
    """Each attempt gets a little further: a note of the recipe, an attempt, and three commits."""
    folder = stopped(tmp_path, 9, **CHANGES)
    for _ in range(100):
        try:
            with killed_at(6):
                go_on(folder)
        except Killed:
            continue
        break
    check_same(go_on(folder), uninterrupted[0])
    assert not [name for name in files_in(folder) if name.endswith(".part")]


WITH_MOMENTS = ("local", "pflalign", "ditto")
"""Methods whose state or form is another one with AdamW."""


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [*((name, "sgd") for name in METHODS), *((name, "adamw") for name in WITH_MOMENTS)],
)
def test_every_method_goes_on_as_it_was(tmp_path: Path, method: str, optimizer: str) -> None:
    changes: dict[str, Any] = {"method.name": method, "training.optimizer": optimizer}
    if (method, optimizer) == ("pflalign", "adamw"):
        changes |= {"method.precondition_target": "update", "method.update_scale": "match"}
    folder = stopped(tmp_path / "stopped", 20, **changes)
    check_same(go_on(folder), whole(tmp_path / "whole", **changes))


def test_an_automatic_rate_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too high a rate at first; stopped in the round that shows it, and after it was halved."""
    monkeypatch.setattr("pfl_lm.train.rate.TAU", 400.0)
    changes = {"training.learning_rate": "auto"}
    expected = whole(tmp_path / "whole", **changes)
    for k in (12, 20, 30):
        check_same(go_on(stopped(tmp_path / str(k), k, **changes)), expected)


# --- more rounds ------------------------------------------------------------------------------


def test_more_rounds_lead_where_as_many_at_once_would(tmp_path: Path) -> None:
    short = whole(tmp_path / "short", **CHANGES)
    long = whole(tmp_path / "long", **CHANGES, **{"federation.rounds": 4})
    extended = go_on(short, rounds=4)
    mine, theirs = files_in(extended), files_in(long)
    assert mine.keys() == theirs.keys()
    apart = ("metrics.csv", "recipe.yaml", "recipe.resolved.yaml", "federation.sqlite")
    assert [n for n in mine if mine[n] != theirs[n] and n not in apart] == []
    assert "rounds: 4" in (extended / "recipe.resolved.yaml").read_text()
    mine_said, theirs_said = facts_in(extended), facts_in(long)
    assert set(theirs_said.pop("scores")) < set(mine_said.pop("scores"))  # round 2 was final once
    assert mine_said == theirs_said


def test_fewer_rounds_end_a_run_early(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 20, **CHANGES, **{"federation.rounds": 4})
    with closing(Ledger(folder / "federation.sqlite")) as ledger:
        assert ledger.last_begun() == 1
    check_same(go_on(folder, rounds=2), whole(tmp_path / "b", **CHANGES))


def test_a_round_that_has_begun_cannot_be_taken_back(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    with pytest.raises(RecipeError) as caught:
        run_recipe(folder, rounds=1)
    assert str(caught.value) == (
        "federation.rounds: 1, and round 2 of this run has begun already\n  hint: the least is 2"
    )


# --- the command line -------------------------------------------------------------------------


def cli(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*arguments])
    return result.exit_code, result.stdout, result.stderr


def test_resume_says_where_it_goes_on_and_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 30)
    code, out, err = cli("resume", str(folder))
    assert (code, err) == (0, "")
    assert out.startswith(f"tiny: pflalign, going on in {folder}\n")
    assert "3 clients, round 1 of 2 is over; left to do: " in out
    code, out, _ = cli("resume", str(folder))
    assert (code, out) == (
        0,
        f"{folder}: finished, all 2 rounds\n"
        f"next: for more of them  pfl-lm resume {folder} --rounds 4\n",
    )


def test_finetune_resume_goes_on_or_begins(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 20)
    recipe = str(tmp_path / "a" / "recipe.yaml")
    code, _, said = cli("finetune", recipe)
    assert code == 2
    assert said == (
        f"{folder}: this run folder already holds a run\n  hint: go on with it by "
        f"`pfl-lm resume {folder}`; or choose another `name` or `runtime.output_dir`, "
        "or remove it\n"
    )
    assert cli("finetune", recipe, "--resume")[0] == 0
    check_same(folder, whole(tmp_path / "b"))
    fresh = str(tiny_recipe(tmp_path, name="fresh"))
    assert cli("finetune", fresh, "--resume")[0] == 0


def test_a_run_folder_may_be_moved(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 25)
    moved = tmp_path / "elsewhere" / "another name"
    moved.parent.mkdir()
    folder.rename(moved)
    assert finetune(run_recipe(moved), resume=True).folder == moved
    check_same(moved, whole(tmp_path / "b"))
    assert not folder.exists()


# --- what is refused --------------------------------------------------------------------------


def refusal(kind: type[PflError], call: Any, *given: Any, **named: Any) -> str:
    with pytest.raises(kind) as caught:
        call(*given, **named)
    return str(caught.value)


def test_where_no_run_has_begun(tmp_path: Path) -> None:
    start = "  hint: start one with `pfl-lm finetune RECIPE`, then resume it"
    none = tmp_path / "none"
    assert refusal(RunFolderError, run_recipe, none) == f"{none}: there is no such folder\n{start}"
    said = f"{tmp_path}: no run has begun in this folder\n{start}"
    assert refusal(RunFolderError, run_recipe, tmp_path) == said


def test_another_recipe_is_refused_key_by_key(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 20)
    recipe = str(tmp_path / "a" / "recipe.yaml")
    changes = ["training.max_steps=3", "adapter.r=4", "adapter.target_modules=[k_proj]"]
    before = files_in(folder)
    code, _, said = cli("finetune", recipe, "--resume", *changes, "runtime.threads=2")
    assert code == 2
    assert said == (
        f"{recipe}: not the recipe this run began with: 3 problems\n"
        "  adapter.r: 4, and the run began with 8\n"
        "  adapter.target_modules: k_proj, and the run began with q_proj, v_proj\n"
        "  training.max_steps: 3, and the run began with 2\n"
        "  hint: put these keys back to resume, or give the recipe another `name` to start anew\n"
    )
    assert files_in(folder) == before


def test_a_resolved_recipe_that_was_edited_is_refused(tmp_path: Path) -> None:
    folder = stopped(tmp_path, 20)
    path = folder / "recipe.resolved.yaml"
    text = path.read_text()
    path.write_text(text.replace("seed: 7", "seed: 8"))
    said = refusal(RecipeError, run_recipe, folder)
    assert "  seed: 8, and the run began with 7\n" in said
    path.write_text(text + "# a remark\n")
    assert run_recipe(folder).recipe.seed == 7
    path.unlink()
    go_on(folder)
    assert path.read_text() == text


def test_rows_that_changed_are_refused(tmp_path: Path) -> None:
    folder = stopped(tmp_path, 20)
    rows = client_rows(("alice", "bob", "dora"))
    rows[0]["completion"] = "another answer"
    write_jsonl(tmp_path / "clients.jsonl", rows)
    said = refusal(DataError, run_clients, run_recipe(folder))
    assert said == (
        f"{tmp_path}/clients.jsonl: 3 problems\n"
        "  client 'alice': its rows are not those the run began with\n"
        "  client 'carol': its rows are gone\n"
        "  client 'dora': not of this run\n"
        f"  hint: put the rows back; a client comes with `pfl-lm join {folder} --id ID "
        f"--data FILE` and goes with `pfl-lm remove {folder} --id ID`"
    )


def test_a_data_file_may_move(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 20)
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "a" / "clients.jsonl").rename(moved)
    recipe = str(tmp_path / "a" / "recipe.yaml")
    assert cli("finetune", recipe, "--resume", f"data.path={moved}")[::2] == (0, "")
    check_same(folder, whole(tmp_path / "b"))


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    folder = stopped(tmp_path, 20, **{"backbone.model_name_or_path": str(model)})
    save_model(model, seed=1)
    assert refusal(RunFolderError, go_on, folder) == (
        f"{folder}: this run began on another backbone than the one that was loaded\n"
        "  hint: put the weights back that it began with; or start a run of another name"
    )


def test_states_that_are_missing_or_swapped_are_named_at_once(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    alice, bob, carol = (
        folder / f"clients/{c}/state-2.safetensors" for c in ("alice", "bob", "carol")
    )
    alice.unlink()
    content = bob.read_bytes()
    bob.write_bytes(carol.read_bytes())
    carol.write_bytes(content[:100])
    said = refusal(RunFolderError, go_on, folder, 3)
    assert said == (
        f"{folder}: 3 problems\n"
        f"  {alice}: cannot be read: No such file or directory\n"
        f"  {bob}: not the file that the ledger names (SHA-256 differs)\n"
        f"  {carol}: not the file that the ledger names (SHA-256 differs)\n"
        "  hint: put these files back from a copy; without them the run cannot go on"
    )


@pytest.mark.parametrize("name", ["clients", "clients/alice", "server", "adapters", "global"])
def test_links_out_of_a_run_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = whole(tmp_path / "run")
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    before = files_in(outside)
    said = refusal(RunFolderError, go_on, folder, 3)
    assert said.startswith(f"{folder}: links in a run folder are not followed: 1 problem\n")
    assert f"  {folder / name}\n" in said
    assert files_in(outside) == before


def test_what_an_interruption_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", 25)
    ours = [
        "clients/alice/state-9.safetensors",
        "server/state-9.safetensors",
        "uploads/9/bob.safetensors",
        "adapters/bob/.adapter_config.json.123.part",
        ".metrics.csv.123.part",
    ]
    theirs = ["clients/alice/notes.txt", "mine.txt", "server/state-x.safetensors"]
    for name in (*ours, *theirs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left")
    go_on(folder)
    assert [name for name in ours if (folder / name).exists()] == []
    for name in theirs:
        assert (folder / name).read_text() == "left"
        (folder / name).unlink()
    check_same(folder, whole(tmp_path / "b"))


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """A fork stands for it: the lock is not this process's own."""
    folder = stopped(tmp_path, 20)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with run_lock(folder):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        code, _, said = cli("resume", str(folder))
        assert code == 2
        pattern = (
            rf"{re.escape(str(folder))}: another process is at work in this run folder "
            rf"\(process {child} on .+\)\n  hint: wait until it is done, or stop it; a process "
            r"that was killed holds no lock\n"
        )
        assert re.fullmatch(pattern, said), said
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
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

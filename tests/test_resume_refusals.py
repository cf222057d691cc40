"""What a run cannot be gone on with: other recipes, rows, backbones and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pfl_lm.errors import DataError, PflError, RecipeError, RunFolderError
from pfl_lm.resume import run_clients, run_recipe
from tests.interruptions import cli, go_on, stopped, whole
from tests.same import check_same, files_in
from tests.tiny import client_rows, save_model, write_jsonl


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

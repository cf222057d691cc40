"""A recipe and its seed fix every byte of a run, in this process and in others."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from pfl_lm.finetune import finetune
from pfl_lm.recipe import load_recipe
from tests.runs import environment, pfl_lm_command, run, with_rows
from tests.same import files_in
from tests.tiny import client_rows, tiny_recipe, write_jsonl

SEVERAL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
HOSTILE = ("model", "self_attn", "a.b", "../x", "Ünï", "client_1", "client_10", "Case", "case")


def results_in(folder: Path) -> dict[str, bytes]:
    """Return what two equal runs must have equal: all but clocks and paths."""
    files = files_in(folder)
    apart = {"recipe.yaml", "recipe.resolved.yaml", "federation.sqlite"}
    return {name: content for name, content in files.items() if name not in apart}


def test_a_seed_fixes_every_byte_and_another_one_changes_them(tmp_path: Path) -> None:
    changes = {"adapter.lora_dropout": 0.2, "adapter.target_modules": SEVERAL}
    first = results_in(run(tmp_path / "a", **changes).folder)
    torch.manual_seed(123)  # what the process drew before must not matter
    again = results_in(run(tmp_path / "b", **changes).folder)
    other = results_in(run(tmp_path / "c", seed=8, **changes).folder)

    assert first == again
    assert len(first) == 2 + 4 + 12  # metrics, index; states; adapters with their cards
    for name in (name for name in first if not name.endswith("adapter_config.json")):
        assert first[name] != other[name], name


def test_another_process_with_another_hash_seed_ends_the_same(tmp_path: Path) -> None:
    """Through the command line, and with modules enough for a set of names to come in disorder."""
    changes = {"adapter.target_modules": SEVERAL, "federation.fraction_train": 0.7}
    folder = run(tmp_path, **changes).folder
    overrides = [f"runtime.output_dir={tmp_path / 'other'}"]
    done = subprocess.run(
        pfl_lm_command("finetune", str(tmp_path / "recipe.yaml"), *overrides),
        capture_output=True,
        text=True,
        env=environment(PYTHONHASHSEED="12345"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert results_in(tmp_path / "other" / "tiny") == results_in(folder)
    assert "\x1b" not in done.stdout + done.stderr
    assert [line.split(" · ")[0] for line in done.stdout.splitlines() if " · " in line] == [
        *("round 0/2", "round 1/2", "round 2/2")
    ]
    assert str(tmp_path / "other" / "tiny" / "adapters") in done.stdout


@pytest.mark.parametrize("rate", [0.1, "auto"])
def test_the_resolved_recipe_starts_the_same_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float | str
) -> None:
    """From its place in the run folder, though paths were relative and keys overridden."""
    write_jsonl(tmp_path / "rows.jsonl", client_rows())
    relative = {"data.path": "rows.jsonl", "runtime.output_dir": "runs"}
    recipe = tiny_recipe(tmp_path, **relative, **{"training.learning_rate": rate})
    first = finetune(load_recipe(recipe, ["seed=3", "adapter.r=4"])).folder
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe.unlink()

    again = finetune(load_recipe(first / "recipe.resolved.yaml", ["name=again"])).folder

    assert again == first.with_name("again")
    ends = [results_in(folder) for folder in (first, again)]
    for end in ends:  # cards and the index name the run
        assert {name for name in end if name.startswith("adapters/")}
        for name in [name for name in end if name.endswith("README.md")]:
            del end[name]
        index = json.loads(end.pop("adapters.json"))
        end["index"] = json.dumps(index["clients"]).encode()
    assert ends[0] == ends[1]
    resolved = [(folder / "recipe.resolved.yaml").read_text() for folder in (first, again)]
    assert resolved[0].replace("name: tiny", "name: again") == resolved[1]


def test_hostile_ids_get_their_own_adapters_and_touch_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `local` nobody learns of anybody: together each must get what it gets alone."""
    once = {"method.name": "local", "federation.rounds": 1}
    inside = tmp_path / "in" / "deeper"
    together_rows = with_rows(inside, client_rows(HOSTILE))
    monkeypatch.chdir(inside)
    before = files_in(tmp_path)

    result = run(inside, **once, **together_rows)

    after = files_in(tmp_path)
    new = {name for name in after if name not in before and name != "in/deeper/recipe.yaml"}
    assert all(name.startswith("in/deeper/runs/tiny/") for name in new)
    assert all(after[name] == content for name, content in before.items())
    assert [client.client for client in result.clients] == sorted(HOSTILE)
    assert len({client.sha256 for client in result.clients}) == len(HOSTILE)
    adapters = {path.name for path in (result.folder / "adapters").iterdir()}
    assert adapters == {client.slug for client in result.clients}
    for client in result.clients:
        alone = inside / f"alone-{client.slug}"
        rows = with_rows(alone, client_rows((client.client,)))
        [single] = run(alone, **once, **rows).clients
        assert single.choice == client.choice
        assert single.scores == client.scores
        assert single.sha256 == client.sha256

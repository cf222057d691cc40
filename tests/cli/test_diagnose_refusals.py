"""`pfl-lm diagnose`: what it refuses, and run folders made to deceive."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from pfl_lm.finetune import finetune
from pfl_lm.recipe import load_recipe
from tests.cli.diagnosed import CSV, ON, change, cli
from tests.interruptions import held_by_another, whole
from tests.tiny import client_rows, tiny_recipe, write_jsonl


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    code, _, stderr = cli(tmp_path / "none")
    assert code == 2
    assert stderr.startswith(f"{tmp_path}/none: there is no such folder\n  hint: start one with ")
    code, _, stderr = cli(tmp_path)
    assert code == 2
    assert stderr.startswith(f"{tmp_path}: no run has begun in this folder\n")


def test_a_round_that_is_not_there(run: Path) -> None:
    code, _, stderr = cli(run, "--no-bound", "--round", 9)
    assert code == 2
    assert stderr == (
        "--round: no turn of round 9 has noted diagnostics\n"
        "  hint: those that have are of 2 rounds, 1 to 2\n"
    )
    assert not (run / CSV).exists()


def test_a_run_that_another_process_is_at(run: Path) -> None:
    with held_by_another(run):
        code, _, stderr = cli(run)
        assert code == 2
        assert f"{run}: another process is at work in this run folder" in stderr
    assert not (run / CSV).exists()


def test_an_adapter_that_is_not_the_indexs(run: Path) -> None:
    path = run / "adapters" / "bob" / "adapter_model.safetensors"
    path.write_bytes((run / "adapters" / "alice" / path.name).read_bytes())
    code, stdout, stderr = cli(run, "--samples", 1)
    assert code == 2
    assert stderr.startswith(
        f"{path}: not the adapter that adapters.json names (SHA-256 differs)\n"
    )
    assert "round 2, layer by layer" in stdout
    assert (run / CSV).exists()


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"a": torch.zeros(1)}, "not an adapter as this run's recipe makes it; these differ: 'a',"),
        (None, "no safetensors file: "),
        ("nan", "holds numbers that are not finite"),
    ],
)
def test_an_adapter_that_is_none(run: Path, tensors: Any, told: str) -> None:
    path = run / "adapters" / "alice" / "adapter_model.safetensors"
    if tensors == "nan":
        tensors = {key: x * torch.nan for key, x in load_file(path).items()}
    content = b"nothing" if tensors is None else save(tensors)
    path.write_bytes(content)
    index = json.loads((run / "adapters.json").read_text())
    index["clients"]["alice"]["sha256"] = hashlib.sha256(content).hexdigest()
    (run / "adapters.json").write_text(json.dumps(index))
    code, _, stderr = cli(run, "--samples", 1)
    assert code == 2
    assert stderr.startswith(f"{path}: {told}")


def test_an_index_of_strangers(run: Path) -> None:
    text = (run / "adapters.json").read_text().replace('"alice": {', '"mallory": {', 1)
    (run / "adapters.json").write_text(text)
    code, _, stderr = cli(run, "--samples", 1)
    assert code == 2
    assert stderr == f"{run}: adapters.json has 'mallory', no client of this run\n"


def test_rows_that_have_changed(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    rows = tmp_path / "clients.jsonl"
    rows.write_text(rows.read_text().replace("apple", "maple"))
    code, _, stderr = cli(folder, "--samples", 1)
    assert code == 2
    assert "client 'alice': its rows are not those the run began with" in stderr
    assert cli(folder, "--no-bound")[0] == 0


@pytest.mark.parametrize("name", ["adapters", "clients", "adapters/alice", "global"])
def test_links_are_not_followed(run: Path, tmp_path: Path, name: str) -> None:
    (run / name).rename(tmp_path / "aside")
    (run / name).symlink_to(tmp_path / "aside")
    code, _, stderr = cli(run)
    assert code == 2
    assert "links in a run folder are not followed" in stderr
    assert not (run / CSV).exists()


def test_a_link_in_the_files_place_is_replaced(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("other")
    (run / CSV).symlink_to(other)
    assert cli(run, "--no-bound")[0] == 0
    assert other.read_text() == "other"
    assert not (run / CSV).is_symlink()


@pytest.mark.parametrize("value", ["x", [1.0], None, {"a": 1}, True])
def test_a_summary_that_is_not_numbers_is_refused(run: Path, value: object) -> None:
    text = json.dumps({"diagnostics/drift/all": value})
    change(run, "UPDATE turns SET summary = ? WHERE client = 'bob'", text)
    code, _, stderr = cli(run)
    assert code == 2
    assert "a turn's summary is not numbers by name" in stderr


def test_strange_names_and_numbers_are_neither_shown_nor_written(run: Path) -> None:
    strange = {
        "diagnostics/drift/\x1b[2J": 1.0,
        "diagnostics/\x1b[31mdrift/all": 1.0,
        "diagnostics/drift/" + "9" * 100_000: 1.0,
        "\x1b]0;title\x07": 2.0,
        "diagnostics/cosine/all": float("nan"),
        "diagnostics/gamma_mean/0": 10**400,
        "diagnostics/gamma_std/all": float("inf"),
        "diagnostics/offset_norm/0": 1.7e308,
        "diagnostics/drift/all": 0.5,
    }
    change(run, "UPDATE turns SET summary = ?", json.dumps(strange))
    code, stdout, stderr = cli(run, "--no-bound")
    assert (code, stderr) == (0, "")
    assert all(c == "\n" or c.isprintable() for c in stdout)
    rows = (run / CSV).read_text().splitlines()[1:]
    kept = {"all,drift,0.5", "0,offset_norm,1.7e+308"}
    assert {row.split(",", 2)[2] for row in rows} == kept
    assert len(rows) == 2 * 3 * 2


def test_a_clients_id_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    name = "mal\u202elory\u2028" + "x" * 500
    data = write_jsonl(tmp_path / "rows.jsonl", client_rows(("alice", name)))
    recipe = tiny_recipe(
        tmp_path, **ON, **{"data.path": str(data), "federation.rounds": 1, "data.max_length": 2000}
    )
    folder = finetune(load_recipe(recipe)).folder
    code, stdout, stderr = cli(folder, "--samples", 1)
    assert (code, stderr) == (0, "")
    assert all(c == "\n" or c.isprintable() for c in stdout)
    assert r"mal\u202elory\u2028xxx" in stdout
    assert "x" * 200 not in stdout
    with (folder / CSV).open(newline="", encoding="utf-8") as file:
        assert {row["client"] for row in csv.DictReader(file)} == {"alice", name}

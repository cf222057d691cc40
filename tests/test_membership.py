"""Clients that come late and clients that leave: what they get, and what is left of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pfl_lm.errors import DataError, PflError, RunFolderError
from pfl_lm.federation.slugs import slug_beside
from pfl_lm.finetune import finetune
from pfl_lm.membership import join, remove
from pfl_lm.recipe import load_recipe
from pfl_lm.resume import run_recipe
from tests.interruptions import Killed, cli, killed_at, stopped
from tests.same import check_same, facts_in, files_in, results_in
from tests.tiny import client_rows, tiny_recipe, write_jsonl


def run(folder: Path, clients: tuple[str, ...] = ("alice", "bob", "carol"), **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    data = {"data.path": str(write_jsonl(folder / "rows.jsonl", client_rows(clients)))}
    return finetune(load_recipe(tiny_recipe(folder, **data, **changes))).folder


def go_on(folder: Path, rounds: int | None = None) -> Path:
    return finetune(run_recipe(folder, rounds), resume=True).folder


def rows_of(folder: Path, client: str = "dora", *, named: bool = True) -> Path:
    rows = client_rows((client,))
    if not named:
        rows = [{key: value for key, value in row.items() if key != "client"} for row in rows]
    return write_jsonl(folder / f"{client}.jsonl", rows)


# --- joining ----------------------------------------------------------------------------------


def test_who_joins_a_finished_run_gets_an_adapter_and_changes_nobody_elses(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    before = files_in(folder)
    code, out, err = cli(
        "join", str(folder), "--id", "dora", "--data", str(rows_of(tmp_path, named=False))
    )
    assert (code, err) == (0, "")
    assert out.startswith(
        "dora has joined, after round 2: 5 train, 1 validation, 2 test rows\n"
        f"tiny: pflalign, going on in {folder}\n"
    )
    after = files_in(folder)
    new = {name for name in after if name not in before}
    adapter = ("README.md", "adapter_config.json", "adapter_model.safetensors")
    assert new == {
        "clients/dora/state-2.safetensors",
        *(f"adapters/dora/{name}" for name in adapter),
    }
    unchanged = ("clients/", "server/", "adapters/alice/adapter_model", "global/adapter_model")
    for name in (name for name in before if name.startswith(unchanged)):
        assert after[name] == before[name], name
    entry = json.loads(after["adapters.json"])["clients"]["dora"]
    assert entry["scores"].keys() == {"validation", "test"}
    facts = facts_in(folder)
    assert [row[:2] for row in facts["turns"] if row[1] == "dora"] == [(2, "dora")]
    assert [row for row in facts["cohorts"] if row[1] == "dora"] == []
    [(upload, weight)] = [row[4:7:2] for row in facts["turns"] if row[1] == "dora"]
    assert (upload, weight) == (None, 0.0)


def test_the_first_turn_starts_from_the_shared_weights(tmp_path: Path) -> None:
    """And is the turn that a federation of one would take from there."""
    folder = run(tmp_path / "a", **{"method.name": "fedavg"})
    join(folder, "dora", rows_of(tmp_path))
    go_on(folder)
    shared = load_file(folder / "server" / "state-2.safetensors")["global_weights"]
    mine = load_file(folder / "clients" / "dora" / "state-2.safetensors")["weights"]
    steps, rate = 2, 0.1
    moved = (mine - shared).norm()
    assert 0 < moved < steps * rate * 10


def test_who_joined_takes_part_in_later_rounds(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    join(folder, "dora", rows_of(tmp_path))
    extended = go_on(folder, rounds=3)
    facts = facts_in(extended)
    assert [row[:2] for row in facts["cohorts"]][-4:] == [
        (3, client) for client in ("alice", "bob", "carol", "dora")
    ]
    weights = [row[6] for row in facts["turns"] if row[0] == 3]
    assert weights == [5.0, 5.0, 5.0, 5.0]


def test_who_joins_a_run_in_progress_waits_for_the_next_round(tmp_path: Path) -> None:
    folder = stopped(tmp_path, 28)  # within round 2
    code, out, _ = cli("join", str(folder), "--id", "dora", "--data", str(rows_of(tmp_path)))
    assert code == 0
    assert out.splitlines()[-1] == f"next: go on with the run  pfl-lm resume {folder}"
    go_on(folder)
    facts = facts_in(folder)
    assert [row[:2] for row in facts["turns"] if row[1] == "dora"] == [(1, "dora")]
    assert (folder / "adapters" / "dora" / "adapter_model.safetensors").exists()
    assert {row[1] for row in facts["scores"] if row[0] == 2} == {"alice", "bob", "carol", "dora"}


def test_scaffolds_corrections_stay_the_mean_of_the_clients_when_one_joins(tmp_path: Path) -> None:
    """Dora's first turn is not heard of, and c is of four then, where it was of three."""
    folder = run(tmp_path / "a", **{"method.name": "scaffold", "training.learning_rate": 0.5})
    join(folder, "dora", rows_of(tmp_path))
    go_on(folder)
    first = load_file(folder / "clients" / "dora" / "state-2.safetensors")
    assert not first["control"].any()
    assert first["weights"].any()
    go_on(folder, rounds=3)
    names = ("alice", "bob", "carol", "dora")
    states = [load_file(folder / "clients" / name / "state-3.safetensors") for name in names]
    mean = torch.stack([state["control"].double() for state in states]).mean(dim=0)
    control = load_file(folder / "server" / "state-3.safetensors")["control"]
    assert float(mean.norm()) > 1e-3
    torch.testing.assert_close(control.double(), mean, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2, 4, 5, 6, 7, 8])
def test_a_join_that_is_cut_short_is_gone_on_with(tmp_path: Path, k: int) -> None:
    expected, folder = run(tmp_path / "a"), run(tmp_path / "b")
    path = rows_of(tmp_path)
    join(expected, "dora", path)
    go_on(expected)

    def both() -> None:
        join(folder, "dora", path)
        go_on(folder)

    with killed_at(k), pytest.raises(Killed):
        both()
    if k == 1:
        join(folder, "dora", path)
    go_on(folder)
    check_same(folder, expected)


def test_a_client_that_is_there_already_is_refused(tmp_path: Path) -> None:
    folder = run(tmp_path)
    with pytest.raises(PflError) as caught:
        join(folder, "bob", rows_of(tmp_path, "bob"))
    assert str(caught.value) == (
        "--id: 'bob' is a client of this run already\n"
        f"  hint: to give it other rows, remove it first: pfl-lm remove {folder} --id bob"
    )


def test_rows_of_others_are_refused(tmp_path: Path) -> None:
    folder = run(tmp_path)
    before = files_in(folder)
    with pytest.raises(DataError, match="'erin'"):
        join(folder, "dora", rows_of(tmp_path, "erin"))
    assert {n: c for n, c in files_in(folder).items() if "sqlite" not in n} == {
        n: c for n, c in before.items() if "sqlite" not in n
    }
    assert [row[0] for row in facts_in(folder)["clients"]] == ["alice", "bob", "carol"]


def test_a_client_without_a_supervised_token_is_refused_before_it_is_one(tmp_path: Path) -> None:
    folder = run(tmp_path)
    row = {"client": "dora", "completion": "x", "split": "train"}
    long = [{**row, "prompt": f"{i} " + "long " * 500} for i in range(8)]
    with pytest.raises(DataError, match="0 of 7 train rows keep a supervised token"):
        join(folder, "dora", write_jsonl(tmp_path / "dora.jsonl", long))
    assert [row[0] for row in facts_in(folder)["clients"]] == ["alice", "bob", "carol"]


def test_a_file_that_went_away_is_told_of(tmp_path: Path) -> None:
    folder = run(tmp_path)
    path = rows_of(tmp_path)
    join(folder, "dora", path)
    path.unlink()
    with pytest.raises(DataError, match=r"there is no file '.*dora\.jsonl'"):
        go_on(folder)


def test_late_slugs_leave_the_others_alone() -> None:
    assert slug_beside("Dora", ["alice"]) == "dora"
    first = slug_beside("Dora!", ["dora"])
    assert first.startswith("dora-")
    assert len(first) == len("dora-") + 8
    second = slug_beside("Dora!", ["dora", first])
    assert second.startswith("dora-")
    assert second not in ("dora", first)
    assert slug_beside("???", []).startswith("client-")
    assert slug_beside("con", []) != "con"


# --- leaving ----------------------------------------------------------------------------------


def traces(folder: Path, client: str) -> list[str]:
    """Return every file whose name or content has the client's id in it."""
    return [n for n, c in files_in(folder).items() if client in n or client.encode() in c]


def test_nothing_is_left_of_who_was_removed_but_what_it_taught(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    before = files_in(folder)
    assert traces(folder, "bob")
    code, out, err = cli("remove", str(folder), "--id", "bob")
    assert (code, err) == (0, "")
    assert out == (
        "bob is gone: its state, adapter, card, scores and rows of the ledger\n"
        "what the shared adapter has learned from it stays in it; --replay would run all rounds\n"
        "again without it. Its rows in your data file, and what was pushed, are yours to remove\n"
    )
    assert traces(folder, "bob") == []
    after = files_in(folder)
    kept = ("clients/", "server/", "adapters/", "global/")
    for name in (n for n in before if n.startswith(kept) and "bob" not in n):
        assert after[name] == before[name], name


def test_a_run_goes_on_without_who_was_removed(tmp_path: Path) -> None:
    folder = stopped(tmp_path, 28)
    remove(folder, "bob")
    go_on(folder)
    assert [c for c, *_ in facts_in(folder)["clients"]] == ["alice", "carol"]
    assert {row[1] for row in facts_in(folder)["turns"] if row[0] == 2} == {"alice", "carol"}


@pytest.mark.parametrize("rate", [0.1, "auto"])
def test_a_replay_ends_as_a_run_that_never_knew_it(tmp_path: Path, rate: float | str) -> None:
    changes = {"training.learning_rate": rate, "federation.fraction_train": 0.7}
    folder = run(tmp_path / "a", **changes)
    assert cli("remove", str(folder), "--id", "bob", "--replay")[0] == 0
    without = run(tmp_path / "b", ("alice", "carol"), **changes)
    assert results_in(folder) == results_in(without)
    mine, theirs = facts_in(folder), facts_in(without)
    assert len(mine.pop("removed")) == 1
    assert theirs.pop("removed") == []
    assert mine == theirs


def test_a_replay_welcomes_who_joined_where_it_did(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    join(folder, "dora", rows_of(tmp_path))
    go_on(folder, rounds=3)
    remove(folder, "bob", replay=True)
    go_on(folder)
    turns = [row[:2] for row in facts_in(folder)["turns"]]
    assert turns == [
        *((1, c) for c in ("alice", "carol")),
        *((2, c) for c in ("alice", "carol", "dora")),
        *((3, c) for c in ("alice", "carol", "dora")),
    ]


def test_a_removal_that_is_cut_short_can_be_made_again(tmp_path: Path) -> None:
    folder = run(tmp_path)
    with killed_at(1), pytest.raises(Killed):
        remove(folder, "bob")
    remove(folder, "bob")
    assert [c for c, *_ in facts_in(folder)["clients"]] == ["alice", "carol"]
    assert not (folder / "clients" / "bob").exists()


def test_who_was_removed_may_come_back(tmp_path: Path) -> None:
    folder = run(tmp_path)
    remove(folder, "bob")
    join(folder, "bob", rows_of(tmp_path, "bob"))
    go_on(folder)
    assert (folder / "adapters" / "bob" / "adapter_model.safetensors").exists()


def test_a_slug_names_a_client_too(tmp_path: Path) -> None:
    folder = run(tmp_path, ("alice", "Ünï code"))
    assert remove(folder, "uni-code").client == "Ünï code"


def test_strangers_and_the_last_client_are_refused(tmp_path: Path) -> None:
    folder = run(tmp_path, ("alice", "bob"))
    with pytest.raises(PflError) as caught:
        remove(folder, "zoe")
    assert str(caught.value) == (
        f"--id: {folder} has no client 'zoe'\n  hint: it has 'alice', 'bob'"
    )
    remove(folder, "bob")
    with pytest.raises(PflError) as caught:
        remove(folder, "alice")
    assert str(caught.value) == (
        "--id: 'alice' is the only client of this run\n"
        f"  hint: remove the whole folder instead: {folder}"
    )


def test_a_private_run_is_not_replayed(tmp_path: Path) -> None:
    pytest.importorskip("opacus", reason='pip install "pfl-lm[privacy]"')
    lever = {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}
    changes = {"method.weighting": "uniform", "privacy.client_level": lever}
    folder = run(tmp_path, **changes)
    with pytest.raises(PflError) as caught:
        remove(folder, "bob", replay=True)
    assert caught.value.message.startswith("--replay: this run has a privacy lever")
    remove(folder, "bob")
    assert [c for c, *_ in facts_in(folder)["clients"]] == ["alice", "carol"]


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    outside = tmp_path / "outside"
    (folder / "clients" / "bob").rename(outside)
    (folder / "clients" / "bob").symlink_to(outside)
    before = files_in(outside)
    with pytest.raises(RunFolderError, match="links in a run folder are not followed"):
        remove(folder, "bob")
    assert files_in(outside) == before
    assert torch.is_tensor(load_file(outside / "state-2.safetensors")["weights"])


def test_a_client_is_not_taken_out_of_scaffolds_sum(tmp_path: Path) -> None:
    folder = run(tmp_path, **{"method.name": "scaffold", "federation.rounds": 1})
    before = files_in(folder)
    with pytest.raises(PflError) as caught:
        remove(folder, "bob")
    assert str(caught.value) == (
        "--id: scaffold's server keeps the sum of all clients' control variates, and that of 'bob' "
        "cannot be taken out of it\n  hint: have every round run again without it: "
        f"pfl-lm remove {folder} --id bob --replay"
    )
    after = files_in(folder)
    for name in (name for name in before if name.endswith((".safetensors", ".json", ".csv"))):
        assert after[name] == before[name]
    remove(folder, "bob", replay=True)
    go_on(folder)
    facts = facts_in(folder)
    assert {row[1] for row in facts["turns"]} == {"alice", "carol"}


# --- clients that the recipe keeps for later ------------------------------------------------------


def test_who_was_kept_for_later_joins_without_a_file(tmp_path: Path) -> None:
    clients = ("alice", "bob", "carol", "dora")
    folder = run(tmp_path / "a", clients, **{"data.holdout_clients": ["dora"]})
    assert not (folder / "adapters" / "dora").exists()
    code, out, err = cli("join", str(folder), "--id", "dora")
    assert (code, err) == (0, "")
    assert out.startswith("dora has joined, after round 2: 5 train, 1 validation, 2 test rows\n")
    assert (folder / "adapters" / "dora" / "adapter_model.safetensors").is_file()
    with_file = run(tmp_path / "b")
    own = [row for row in client_rows(clients) if row["client"] == "dora"]
    join(with_file, "dora", write_jsonl(tmp_path / "dora.jsonl", own))
    go_on(with_file)
    name = "adapters/dora/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (with_file / name).read_bytes()
    assert go_on(folder, rounds=3) == folder


def test_who_was_not_kept_needs_a_file(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", **{"data.holdout_clients": ["carol"]})
    with pytest.raises(DataError) as caught:
        join(folder, "dora")
    assert str(caught.value) == (
        "--id: 'dora' is not among the clients that data.holdout_clients keeps ('carol')\n"
        "  hint: name one of them, or give the client's rows with --data FILE"
    )


def test_who_is_kept_for_later_is_not_missed_when_the_run_goes_on(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", **{"data.holdout_clients": ["carol"]})
    assert go_on(folder, rounds=3) == folder
    assert not (folder / "adapters" / "carol").exists()
    remove(folder, "bob")
    assert go_on(folder, rounds=4) == folder

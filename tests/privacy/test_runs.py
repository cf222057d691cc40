"""Whole runs with the record-level lever: that they end well, and what they do not tell."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pfl_lm.federation.messages import Update
from pfl_lm.federation.watch import RoundReport, Watch
from pfl_lm.finetune import RunResult, finetune
from pfl_lm.plan import make_plan
from pfl_lm.preflight import check_recipe
from pfl_lm.privacy.spent import NO_LEVER, ClientSpent, largest, said, spent, spent_by_client
from pfl_lm.recipe import load_recipe
from pfl_lm.report.table import summary_lines
from tests.tiny import client_rows, tiny_recipe, write_jsonl

CLIENT = {"noise_multiplier": 1.0, "clip_norm": 0.5, "delta": 1e-2}
RECORD = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-3}


UNEQUAL = [
    *client_rows(["alice"], n_rows=8),
    *client_rows(["bob"], n_rows=12),
    *client_rows(["carol"], n_rows=16),
]
LOOSE = (
    "privacy.record_level.delta: 0.3 is not below 1 / 5, one of 5 rows of alice, so that one may "
    "be told outright; take 0.02 or less"
)


class Listener(Watch):
    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.reports: list[RoundReport] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def turn(self, update: Update) -> None:
        self.updates.append(update)

    def round(self, report: RoundReport) -> None:
        self.reports.append(report)


def run(folder: Path, watch: Watch | None = None, **changes: Any) -> RunResult:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = tiny_recipe(folder, **{"privacy.record_level": RECORD, **changes})
    return finetune(load_recipe(recipe), watch)


def turns(result: RunResult) -> list[tuple[str, int, dict[str, float]]]:
    with closing(sqlite3.connect(result.folder / "federation.sqlite")) as ledger:
        rows = ledger.execute("SELECT client, round, summary FROM turns ORDER BY 1, 2").fetchall()
    return [(client, round, json.loads(summary)) for client, round, summary in rows]


def secret_of(result: RunResult) -> str:
    with closing(sqlite3.connect(result.folder / "federation.sqlite")) as ledger:
        [[found]] = ledger.execute("SELECT value FROM run WHERE key = 'noise_seed'").fetchall()
    return str(found)


@pytest.mark.parametrize("method", ["pflalign", "fedavg", "local"])
def test_a_run_ends_well_and_its_ledger_knows_what_was_spent(tmp_path: Path, method: str) -> None:
    listener = Listener()
    result = run(tmp_path, listener, **{"method.name": method})

    assert [each.client for each in result.clients] == ["alice", "bob", "carol"]
    assert (result.folder / "adapters" / "alice" / "adapter_model.safetensors").is_file()
    spent = turns(result)
    assert len(spent) == 6
    for client, _, summary in spent:
        n_train = next(c for c in result.clients if c.client == client)
        assert n_train
        assert summary["dp_steps"] == 2
        assert summary["dp_noise_multiplier"] == 1.0
        assert summary["dp_sample_rate"] == pytest.approx(2 / 5)  # of 6 train rows 1 is held out
        assert not [key for key in summary if key.startswith("loss")]
    assert [report.train_loss for report in listener.reports] == [None, None, None]


@pytest.mark.parametrize("method", ["pflalign", "fedavg"])
def test_a_run_with_noise_on_the_mean_ends_well(tmp_path: Path, method: str) -> None:
    """The shared adapter is noised; with the same noise, and both levers, the same run again."""
    changes = {"method": {"name": method, "weighting": "uniform"}, "privacy.client_level": CLIENT}
    plain = run(tmp_path / "plain", **{**changes, "privacy": {}})
    noisy = run(tmp_path / "noisy", **{**changes, "privacy": {"client_level": CLIENT}})
    both = run(tmp_path / "both", **changes)
    shared = [
        (result.folder / "global" / "adapter_model.safetensors").read_bytes()
        for result in (plain, noisy, both)
    ]
    assert len(set(shared)) == 3
    assert [len(turns(result)) for result in (plain, noisy, both)] == [6, 6, 6]
    assert not [summary for _, _, summary in turns(noisy) if "dp_steps" in summary]
    assert secret_of(noisy) != secret_of(both)


def test_what_was_planned_is_what_the_ledger_says_was_spent(tmp_path: Path) -> None:
    """ε from the committed rows alone, on the cards and in the closing lines."""
    changes = {
        "privacy.client_level": CLIENT,
        "method.weighting": "uniform",
        "federation.fraction_train": 0.5,
        "federation.rounds": 3,
        "data.path": str(write_jsonl(tmp_path / "rows.jsonl", UNEQUAL)),
    }
    recipe = tiny_recipe(tmp_path, **{"privacy.record_level": RECORD, **changes})
    checked = check_recipe(recipe)
    plan = make_plan(checked.loaded, checked.clients)
    result = run(tmp_path, **changes)

    rounds = Counter(client for client, _, _ in turns(result))
    assert set(rounds.values()) != {3}
    privacy = checked.loaded.recipe.privacy
    for client in result.clients:
        n_train = len(checked.clients[client.client].train)
        mechanism = (1.0, 2 / n_train)
        assert client.spent == ClientSpent(
            spent({mechanism: 2 * rounds[client.client]}, 1e-3),
            spent({(1.0, 1.0): rounds[client.client]}, 1e-2),
        )
        card = (result.folder / "adapters" / client.slug / "README.md").read_text()
        assert said(client.spent.record_level) in card  # type: ignore[arg-type]
        assert said(client.spent.client_level) in card  # type: ignore[arg-type]
    most = largest({client.client: client.spent for client in result.clients})
    assert plan.spent == most
    assert most.record_level is not None
    assert most.client_level is not None
    assert said(most.record_level) in (result.folder / "global" / "README.md").read_text()
    assert (
        f"differential privacy, most of any client: rows, {said(most.record_level)}; "
        f"clients, {said(most.client_level)}"
    ) in summary_lines(result.clients, result.folder)
    ledger = [(client, summary) for client, _, summary in turns(result)]
    again = spent_by_client(ledger, privacy, [client.client for client in result.clients])
    assert again == {client.client: client.spent for client in result.clients}


def test_a_run_without_a_lever_says_nothing_of_privacy(tmp_path: Path) -> None:
    result = run(tmp_path, privacy={})
    assert {client.spent for client in result.clients} == {NO_LEVER}
    assert "privacy" not in " ".join(summary_lines(result.clients, Path("/r")))
    with closing(sqlite3.connect(result.folder / "federation.sqlite")) as ledger:
        assert not ledger.execute("SELECT * FROM run WHERE key = 'noise_seed'").fetchall()


def test_a_loose_delta_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    listener = Listener()
    run(tmp_path, listener, **{"privacy.record_level": RECORD | {"delta": 0.3}})
    assert LOOSE in listener.notes


def test_the_secret_is_in_the_ledger_and_nowhere_else(tmp_path: Path) -> None:
    listener = Listener()
    result = run(tmp_path, listener, **{"runtime.tracking": "tensorboard"})
    secret = secret_of(result).encode()
    assert len(secret) > 25
    holding = [
        path.name
        for path in result.folder.rglob("*")
        if path.is_file() and secret in path.read_bytes()
    ]
    assert holding == ["federation.sqlite"]
    assert secret.decode() not in repr(listener.updates)


def test_two_runs_of_one_recipe_have_other_noise(tmp_path: Path) -> None:
    """The recipe's seed is public; noise that followed from it would be no secret."""
    one, other = (run(tmp_path / name) for name in "ab")
    assert secret_of(one) != secret_of(other)
    hashes = [[client.sha256 for client in result.clients] for result in (one, other)]
    assert hashes[0] != hashes[1]


def test_one_secret_gives_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfl_lm.federation.noise.secrets.randbits", lambda bits: 41)
    one, other = (run(tmp_path / name) for name in "ab")
    assert [c.sha256 for c in one.clients] == [c.sha256 for c in other.clients]
    metrics = [(r.folder / "metrics.csv").read_text() for r in (one, other)]
    assert metrics[0] == metrics[1]
    assert len(list(csv.reader(metrics[0].splitlines()))) > 10

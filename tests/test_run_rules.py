"""Rules of a whole run: what is read when, what never moves, and who takes part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import pfl_lm.data.tokenizing
import pfl_lm.finetune
from pfl_lm.federation.messages import Update
from pfl_lm.federation.watch import RoundReport, Watch, Workload
from pfl_lm.methods import METHODS
from tests.runs import CLIENTS, ask, run, scored, with_rows
from tests.same import files_in
from tests.tiny import client_rows


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
    watch, render = Notes(), pfl_lm.data.tokenizing.render

    def spied(tokenizer: Any, content: Any, task: Any) -> Any:
        watch.events.append(("read", content.prompt))
        return render(tokenizer, content, task)

    monkeypatch.setattr(pfl_lm.data.tokenizing, "render", spied)
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
    drawn = ask(result.folder, "SELECT round, client FROM cohorts ORDER BY 1, 2")
    cohorts = [[client for at, client in drawn if at == round] for round in (1, 2, 3)]
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
    [(trained,)] = ask(result.folder, "SELECT client FROM cohorts WHERE round = 1")
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

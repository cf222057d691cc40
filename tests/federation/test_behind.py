"""What a turn leaves is written behind the next one: in order, and while that one trains."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import pfl_lm.federation.store as store_module
from pfl_lm.errors import RunFolderError
from pfl_lm.federation.behind import Behind
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.store import Store
from pfl_lm.federation.watch import Watch
from pfl_lm.files import write_atomically
from pfl_lm.finetune import finetune
from pfl_lm.methods import ClientState, Upload
from pfl_lm.recipe import load_recipe
from tests.interruptions import Killed, go_on, whole
from tests.same import check_same
from tests.tiny import tiny_recipe

PATIENCE = 20.0
"""Seconds after which something that is waited for will not happen any more."""


def test_jobs_are_done_in_the_order_they_were_asked_for() -> None:
    behind, done, gate = Behind(), [], threading.Event()
    behind.do(lambda: gate.wait(PATIENCE))
    for i in range(50):
        behind.do(lambda i=i: done.append(i))
    assert done == []
    gate.set()
    behind.settle()
    assert done == list(range(50))


def test_behind_a_job_that_fails_none_is_done_and_its_error_is_told_once() -> None:
    behind, done = Behind(), []

    def fail() -> None:
        raise RunFolderError("no room")

    behind.do(lambda: done.append("before"))
    behind.do(fail)
    behind.do(lambda: done.append("behind"))
    with pytest.raises(RunFolderError, match="no room"):
        behind.settle()
    assert done == ["before"]
    behind.settle()
    behind.do(lambda: done.append("afterwards"))
    behind.settle()
    assert done == ["before", "afterwards"]


def test_no_more_than_one_turn_waits_in_memory(tmp_path: Path) -> None:
    behind, gate, events = Behind(), threading.Event(), []
    store = Store(tmp_path / "run", {"a": "a"}, torch.device("cpu"), behind)
    state = ClientState({"weights": torch.ones(3)}, {})
    behind.do(lambda: gate.wait(PATIENCE))
    opened = threading.Timer(0.3, lambda: (events.append("opened"), gate.set()))
    opened.start()
    store.save_client("a", 1, state)
    events.append("saved")
    assert events == ["opened", "saved"]
    store.settle()


def test_what_is_saved_may_change_at_once(tmp_path: Path) -> None:
    behind, gate = Behind(), threading.Event()
    store = Store(tmp_path / "run", {"a": "a"}, torch.device("cpu"), behind)
    vector = torch.ones(3)
    store.then(lambda: gate.wait(PATIENCE))
    file = store.save_upload("a", 1, Upload({"weights": vector}, 1.0))
    vector.zero_()
    gate.set()
    store.settle()
    assert torch.equal(store.load_upload(file).vectors["weights"], torch.ones(3))


class Steps(Watch):
    """Tells when a client takes its first step after others have had their turns."""

    def __init__(self) -> None:
        self.turns = 0
        self.on_next = threading.Event()

    def turn(self, update: Any) -> None:
        self.turns += 1

    def step(self) -> None:
        if self.turns == 1:
            self.on_next.set()


def test_the_next_client_trains_while_a_state_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, waited = Steps(), []

    def slowly(path: Path, content: bytes) -> str:
        if path.parts[-3] == "clients" and not waited:
            waited.append(watch.on_next.wait(PATIENCE))
        return write_atomically(path, content)

    monkeypatch.setattr(store_module, "write_atomically", slowly)
    run = finetune(load_recipe(tiny_recipe(tmp_path)), watch)
    assert waited == [True]
    (tmp_path / "plain").mkdir()
    monkeypatch.setattr(store_module, "write_atomically", write_atomically)
    check_same(run.folder, whole(tmp_path / "plain"))


def test_a_row_comes_after_its_files_and_a_round_after_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def noted(path: Path, content: bytes) -> str:
        digest = write_atomically(path, content)
        events.append(path.parts[-3] if path.parts[-2] != "server" else "server")
        return digest

    def telling(call: Any, name: str) -> Any:
        def told(*given: Any, **named: Any) -> Any:
            call(*given, **named)
            events.append(name)

        return told

    monkeypatch.setattr(store_module, "write_atomically", noted)
    for name in ("commit_turn", "commit_round"):
        monkeypatch.setattr(Ledger, name, telling(getattr(Ledger, name), name))
    finetune(load_recipe(tiny_recipe(tmp_path)))
    turn = ["clients", "uploads", "commit_turn"]
    of_round = [*(turn * 3), "server", "commit_round"]
    assert events[:2] == of_round[-2:]  # round 0
    assert events[2:] == of_round * (len(events[2:]) // len(of_round))
    assert len(events) > 2


class Stopping(Steps):
    def step(self) -> None:
        if self.turns == 1:
            raise Killed


def test_whoever_stops_a_run_keeps_the_turn_that_was_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    loaded = load_recipe(tiny_recipe(tmp_path / "a"))
    gate = threading.Event()
    threading.Timer(0.5, gate.set).start()

    def slowly(path: Path, content: bytes) -> str:
        if path.parts[-3] == "clients":
            gate.wait(PATIENCE)
        return write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_atomically", slowly)
        with pytest.raises(Killed):
            finetune(loaded, Stopping())
    ledger = Ledger(loaded.run_folder / "federation.sqlite")
    assert len(ledger.turns(1)) == 1
    ledger.close()
    check_same(go_on(loaded.run_folder), whole(tmp_path / "b"))


def test_a_disk_that_fills_behind_a_turn_ends_the_run_and_nothing_is_half_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    loaded = load_recipe(tiny_recipe(tmp_path / "a"))
    fsync, synced = os.fsync, [0]

    def full(descriptor: int) -> None:
        if threading.current_thread().name.startswith("writing"):
            synced[0] += 1
            if synced[0] >= 5:  # the second client's state: a file and its folder come to two
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFolderError, match="No space left") as error:
            finetune(loaded)
    assert error.value.hint is not None
    assert "make room" in error.value.hint
    ledger = Ledger(loaded.run_folder / "federation.sqlite")
    done = ledger.turns(1)
    ledger.close()
    assert synced[0] == 5
    assert len(done) < 3
    check_same(go_on(loaded.run_folder), whole(tmp_path / "b"))

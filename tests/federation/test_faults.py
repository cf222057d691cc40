"""Turns that fail: asked once more, then left out; the round goes on without them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pfl_lm.errors import RunFolderError
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.faults import (
    LARGEST_STEP,
    TooFewClientsError,
    attempted,
    in_smaller_batches,
    longest_update,
    upload_fault,
)
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.messages import Assignment, Fault, Update
from pfl_lm.federation.watch import Watch
from pfl_lm.finetune import RunResult, finetune
from pfl_lm.methods import Broadcast, FedAvg, ServerState, Upload
from pfl_lm.recipe import load_recipe
from pfl_lm.resume import run_recipe
from tests.same import check_same, facts_in, results_in
from tests.tiny import client_rows, tiny_recipe, write_jsonl
from tests.world import options


class Notes(Watch):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


Spoil = Callable[[Assignment, Callable[[], Update]], Update]


def run(
    folder: Path, spoil: Spoil | None = None, notes: Notes | None = None, **changes: Any
) -> RunResult:
    """Run a tiny recipe whose turns go through ``spoil``."""
    folder.mkdir(exist_ok=True)
    train = ClientSide._train

    def spoiled(self: ClientSide, task: Assignment) -> Update:
        return spoil(task, lambda: train(self, task)) if spoil else train(self, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientSide, "_train", spoiled)
        return finetune(load_recipe(tiny_recipe(folder, **changes)), notes)


def failing(client: str, error: Exception, *, times: int = 10**6, round: int = 1) -> Spoil:
    """Let one client's turns of one round fail, so often."""
    left = [times]

    def spoil(task: Assignment, turn: Callable[[], Update]) -> Update:
        if task.client == client and task.round == round and left[0]:
            left[0] -= 1
            raise error
        return turn()

    return spoil


# --- a run with faults ------------------------------------------------------------------------


def test_a_turn_that_fails_once_leaves_no_trace_in_the_numbers(tmp_path: Path) -> None:
    notes = Notes()
    spoil = failing("bob", ValueError("a glitch"), times=1)
    folder = run(tmp_path / "a", spoil, notes).folder
    assert results_in(folder) == results_in(run(tmp_path / "b").folder)
    facts = facts_in(folder)
    assert facts["faults"] == [(1, "bob", 1, "raised", "ValueError: a glitch")]
    assert (1, "bob", 1) in facts["cohorts"]
    assert notes.said[-1] == (
        "round 1: bob's turn failed (raised: ValueError: a glitch); trying once more"
    )


def test_a_turn_that_fails_twice_is_left_out_of_the_aggregate(tmp_path: Path) -> None:
    """Round 1 is that of alice and carol alone; in round 2 bob is back, from its first state."""
    notes = Notes()
    spoil = failing("bob", ValueError("a bug"))
    result = run(tmp_path / "a", spoil, notes, **{"method.name": "fedavg"})
    facts = facts_in(result.folder)
    assert [row[:4] for row in facts["faults"]] == [
        (1, "bob", 1, "raised"),
        (1, "bob", 2, "raised"),
    ]
    turns = sorted(row[:2] for row in facts["turns"])
    both = [(1, "alice"), (1, "carol"), (2, "alice"), (2, "bob"), (2, "carol")]
    assert turns == both
    assert notes.said[-1].endswith("; it sits this round out")
    assert [client.client for client in result.clients] == ["alice", "bob", "carol"]

    one = {"method.name": "fedavg", "federation.rounds": 1}
    spoiled = run(tmp_path / "b", spoil, **one).folder
    rows = [row for row in client_rows() if row["client"] != "bob"]
    (tmp_path / "c").mkdir()
    data = {"data.path": str(write_jsonl(tmp_path / "c" / "rows.jsonl", rows))}
    without = run(tmp_path / "c", **one, **data).folder
    server = "server/state-1.safetensors"
    assert (spoiled / server).read_bytes() == (without / server).read_bytes()


def test_a_client_keeps_its_state_when_its_turn_fails(tmp_path: Path) -> None:
    spoil = failing("bob", ValueError("a bug"), round=2)
    folder = run(tmp_path, spoil).folder
    assert (folder / "clients" / "bob" / "state-1.safetensors").exists()
    assert (folder / "clients" / "alice" / "state-2.safetensors").exists()


def test_faults_are_kept_when_a_run_is_gone_on_with(tmp_path: Path) -> None:
    """Stopped between bob's two tries: it has one left, whatever process asks."""
    spoil = failing("bob", ValueError("a bug"))
    expected = run(tmp_path / "a", spoil).folder

    class StopError(BaseException):
        pass

    tries = [0]

    def stops(task: Assignment, turn: Callable[[], Update]) -> Update:
        if task.client == "bob" and task.round == 1:
            tries[0] += 1
            if tries[0] == 2:
                raise StopError
        return spoil(task, turn)

    with pytest.raises(StopError):
        run(tmp_path / "b", stops)
    folder = tmp_path / "b" / "runs" / "tiny"
    train = ClientSide._train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ClientSide, "_train", lambda self, task: spoil(task, lambda: train(self, task))
        )
        finetune(run_recipe(folder), resume=True)
    check_same(folder, expected)


def test_too_few_turns_end_the_run_and_a_later_attempt_asks_again(tmp_path: Path) -> None:
    spoil = failing("bob", ValueError("no data today"))
    with pytest.raises(TooFewClientsError) as caught:
        run(tmp_path / "a", spoil, **{"federation.min_clients": 3})
    assert str(caught.value) == (
        "round 1: 2 of 3 clients came through, federation.min_clients is 3: 1 problem\n"
        "  bob: ValueError: no data today\n"
        "  hint: mend what they say, then resume: those who failed are asked again"
    )
    folder = tmp_path / "a" / "runs" / "tiny"
    finetune(run_recipe(folder), resume=True)
    expected = run(tmp_path / "b", **{"federation.min_clients": 3}).folder
    assert results_in(folder) == results_in(expected)
    assert len(facts_in(folder)["faults"]) == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ],
    ids=["cuda", "python", "cpu", "mps"],
)
def test_after_running_out_of_memory_a_turn_takes_half_the_rows_at_a_time(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends where whole batches would have, to rounding."""
    sizes: list[tuple[int, int]] = []
    turn = FedAvg.turn

    def spied(self: FedAvg, sent: Broadcast, client: Any, run: Any) -> Any:
        training = run.training
        sizes.append((training.per_device_train_batch_size, training.gradient_accumulation_steps))
        return turn(self, sent, client, run)

    changes = {"method.name": "fedavg", "federation.rounds": 1}
    expected = run(tmp_path / "b", **changes).folder
    monkeypatch.setattr(FedAvg, "turn", spied)
    folder = run(tmp_path / "a", failing("bob", error, times=1), **changes).folder
    assert sizes == [(2, 1), (2, 1), (1, 2)]
    [(_, _, _, kind, _)] = facts_in(folder)["faults"]
    assert kind == "memory"
    one, other = (
        load_file(each / "clients" / "bob" / "state-1.safetensors")["weights"]
        for each in (folder, expected)
    )
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(math.nan, "not_finite"), (math.inf, "not_finite"), (1e9, "out_of_proportion")],
)
def test_an_update_no_training_leads_to_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, kind: str
) -> None:
    turn = FedAvg.turn

    def spoiled(self: FedAvg, sent: Broadcast, client: Any, run: Any) -> Any:
        upload, state = turn(self, sent, client, run)
        if run.examples[0].input_ids == bobs[0]:
            upload.vectors["weights"].fill_(value)
        return upload, state

    bobs: list[Any] = []
    local_run = ClientSide.local_run

    def remembered(self: ClientSide, client: str, *given: Any, **named: Any) -> Any:
        made = local_run(self, client, *given, **named)
        if client == "bob":
            bobs[:] = [made.examples[0].input_ids]
        return made

    monkeypatch.setattr(ClientSide, "local_run", remembered)
    monkeypatch.setattr(FedAvg, "turn", spoiled)
    bobs.append(None)
    folder = run(tmp_path, **{"method.name": "fedavg", "federation.rounds": 1}).folder
    faults = facts_in(folder)["faults"]
    assert [row[1:4] for row in faults] == [("bob", 1, kind), ("bob", 2, kind)]
    assert not (folder / "clients" / "bob").exists()  # the state its client wrote counts no more
    shared = load_file(folder / "server" / "state-1.safetensors")["global_weights"]
    assert shared.isfinite().all()
    assert shared.abs().max() < 10


def test_a_full_disk_is_no_fault_of_a_client(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="the disk is full"):
        run(tmp_path, failing("bob", RunFolderError("the disk is full")))
    with closing(Ledger(tmp_path / "runs" / "tiny" / "federation.sqlite")) as ledger:
        assert ledger.faults(1) == {}


# --- the parts --------------------------------------------------------------------------------


def test_what_a_turn_raises_becomes_a_fault() -> None:
    task = Assignment("tiny", 2, "bob", "train", Broadcast({}), None, 4, 0)

    def turn(task: Assignment) -> Update:
        raise KeyError("x\ny" * 1000)

    update = attempted(turn, task)
    assert update.fault is not None
    assert (update.round, update.client, update.upload, update.state) == (2, "bob", None, None)
    assert update.fault.kind == "raised"
    assert update.fault.message.startswith("KeyError: ")
    assert "\n" not in update.fault.message
    assert len(update.fault.message) == 300


SERVER = ServerState({"global_weights": torch.tensor([3.0, 4.0]), "velocity": torch.ones(2)})
SENT = Broadcast({"global_weights": SERVER.vectors["global_weights"]})  # of length 5
MOST = 5 * LARGEST_STEP


@pytest.mark.parametrize(
    ("weights", "weight", "said"),
    [
        ([3.0, 4.0 + 5 * LARGEST_STEP], 1.0, None),
        ([3.0, 4.0 + 5 * LARGEST_STEP * 1.001], 1.0, ("out_of_proportion", "its update is ")),
        ([3.0, math.nan], 1.0, ("not_finite", "its upload holds NaN or infinity: weights")),
        ([3.0, 4.0, 5.0], 1.0, ("out_of_proportion", "it sent (3,) numbers where (2,) are due")),
        ([3.0, 4.0], math.nan, ("not_finite", "its weight is nan")),
        ([3.0, 4.0], -1.0, ("not_finite", "its weight is -1.0")),
    ],
)
def test_uploads_that_cannot_be(
    weights: list[float], weight: float, said: tuple[str, str] | None
) -> None:
    fault = upload_fault(SENT, Upload({"weights": torch.tensor(weights)}, weight), MOST)
    if said is None:
        assert fault is None
    else:
        assert isinstance(fault, Fault)
        assert fault.kind == said[0]
        assert fault.message.startswith(said[1])


def test_an_upload_that_answers_nothing_is_only_looked_at_for_nan() -> None:
    far = torch.full((2,), 1e30)
    assert upload_fault(SENT, Upload({}, 0.0), MOST) is None
    assert upload_fault(Broadcast({}), Upload({"weights": far}, 1.0), MOST) is None
    assert upload_fault(SENT, Upload({"weights": far}, 1.0), 0.0) is None


def test_half_an_adapter_is_measured_against_the_half_it_answers() -> None:
    """B may be all zero, so how far it may go is told by what the server has of both factors."""
    sent = Broadcast({"global_A": torch.ones(3), "global_B": torch.zeros(2)})
    for part, fault in (
        ([MOST, 0.0], None),
        ([MOST * 1.01, 0.0], f"its update is {MOST * 1.01:.3g} long, the most is {MOST:.3g}"),
        ([1.0, 2.0, 3.0], "it sent (3,) numbers where (2,) are due"),
    ):
        found = upload_fault(sent, Upload({"B": torch.tensor(part)}, 1.0), MOST)
        assert found == (None if fault is None else Fault("out_of_proportion", fault))


def test_numbers_beside_the_vectors_must_be_finite() -> None:
    fault = upload_fault(SENT, Upload({}, 1.0, {"steps": math.nan}), MOST)
    assert fault == Fault("not_finite", "its steps is nan")


def test_how_far_an_update_may_go_is_told_by_what_is_shared_and_by_nothing_else() -> None:
    assert longest_update(SERVER) == MOST
    halves = {"global_A": torch.tensor([3.0]), "global_B": torch.tensor([4.0])}
    assert longest_update(ServerState(halves)) == MOST
    assert longest_update(ServerState({"velocity": torch.ones(2)})) == 0


@pytest.mark.parametrize(
    ("rows", "accumulation", "expected"),
    [
        (8, 1, (4, 2)),
        (8, 3, (4, 6)),
        (3, 1, (1, 3)),
        (6, 2, (3, 4)),
        (1, 4, (1, 4)),
        (5, 1, (1, 5)),
    ],
)
def test_smaller_batches_make_the_same_steps(
    rows: int, accumulation: int, expected: tuple[int, int]
) -> None:
    training = options(per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation)
    smaller = in_smaller_batches(training)
    assert expected == (smaller.per_device_train_batch_size, smaller.gradient_accumulation_steps)
    assert smaller.rows_in_step == training.rows_in_step

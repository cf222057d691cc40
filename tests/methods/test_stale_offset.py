"""Offsets of clients that were away: kept, or smaller by what the missed rounds would have taken.

Turns run on quadratics F(w) = h/2 (w - c)² with noisy gradients, without a fit around them; whole
runs are at the end.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pfl_lm.finetune import finetune
from pfl_lm.layout import AdapterLayout
from pfl_lm.methods import Broadcast, ClientInfo, ClientState, Setup
from pfl_lm.methods.pflalign import PFLAlign
from pfl_lm.plan import make_plan
from pfl_lm.preflight import check_recipe
from pfl_lm.recipe import PFLAlignOptions, load_recipe
from tests.parity.reference_align import ReferenceState
from tests.tiny import tiny_recipe
from tests.world import options

D, STEPS, RATE = 6, 4, 2.0
CLIENTS = ("alice", "bob", "carol")
ROWS = {"alice": 3, "bob": 5, "carol": 2}
WHO = {1: ("alice", "bob"), 2: CLIENTS, 3: ("alice", "carol"), 4: ("carol",), 5: CLIENTS}
"""Bob misses rounds 3 and 4, alice 4; carol comes late.

A first turn begins with Δ = 0, where γ is ½ whatever the gradients; a second one tells.
"""

rng = np.random.default_rng(4)
CURVATURE = {client: rng.uniform(0.2, 1.5, D) for client in CLIENTS}
CENTRE = {client: rng.normal(0, 2, D) for client in CLIENTS}
NOISE = {(client, n): rng.normal(0, 1, (STEPS, D)) for client in CLIENTS for n in range(1, 6)}
START = rng.normal(0, 1, D)


@dataclass
class Quadratic:
    """A `LocalRun` that calls a method's callbacks as a fit would."""

    client: str
    round: int
    steps: int = STEPS
    n_tokens: int = 1
    learning_rate: float = 1.0
    summary: dict[str, float] = field(default_factory=dict)

    @property
    def n_examples(self) -> int:
        return ROWS[self.client]

    def train(self, start: Tensor, *, steps: int, callbacks: Sequence[Any]) -> Tensor:
        h, c = (torch.tensor(of[self.client]).float() for of in (CURVATURE, CENTRE))
        noise = torch.tensor(NOISE[self.client, self.round]).float()
        adapter = SimpleNamespace(weights=start.clone(), grads=torch.zeros_like(start))
        module = SimpleNamespace(adapter=adapter)
        for t in range(steps):
            for callback in callbacks:
                callback.on_train_batch_start(None, module, None, t)
            adapter.grads.copy_(h * (adapter.weights - c) + noise[t])
            for callback in callbacks:
                callback.on_before_optimizer_step(None, module, None)
            adapter.weights.sub_(RATE * adapter.grads)
            for callback in callbacks:
                callback.on_train_batch_end(None, module, None, None, t)
        return adapter.weights

    def loss_and_grad(self, at: Tensor, batch: Mapping[str, Any]) -> tuple[float, Tensor]:
        raise NotImplementedError


def method_of(**switches: Any) -> PFLAlign:
    chosen = PFLAlignOptions.model_validate({"name": "pflalign", **switches})
    layout = AdapterLayout.of([("q_proj", "A", (1, D // 2)), ("q_proj", "B", (D // 2, 1))])
    return PFLAlign(chosen, Setup(layout, len(CLIENTS), 0, options(learning_rate=RATE)))


@dataclass
class Run:
    """Some rounds: the server's w_g after each, the clients' last states, their summaries."""

    method: PFLAlign
    sent: Broadcast
    shared: list[Tensor]
    states: dict[str, ClientState]
    summaries: dict[tuple[str, int], dict[str, float]]

    def realigned(self, client: str) -> Tensor:
        return self.method.candidates(self.sent, self.states[client])["realigned"]


def run(rounds: int = 5, who: Mapping[int, Sequence[str]] = WHO, **switches: Any) -> Run:
    method = method_of(**switches)
    start = torch.tensor(START).float()
    server = method.init_server(start)
    info = {client: ClientInfo(client, ROWS[client], method.setup.layout) for client in CLIENTS}
    states = {client: method.init_client(info[client], start) for client in CLIENTS}
    summaries, shared = {}, []
    for round in range(1, rounds + 1):
        uploads = []
        for client in who[round]:
            local = Quadratic(client, round)
            sent = method.broadcast(server, client)
            upload, states[client] = method.turn(sent, states[client], local)
            uploads.append(upload)
            summaries[client, round] = local.summary
        server = method.aggregate(server, uploads, round)
        shared.append(server.vectors["global_weights"])
    return Run(method, method.broadcast(server, ""), shared, states, summaries)


def reference(correction: str = "erf") -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Five rounds in float64, formula by formula: every w_g, and w_g + Δ of each client at the end.

    Rounds are counted by hand: a client's offset shrinks once for every round it is not in.
    """
    w_g, shared = START.copy(), []
    memory = {client: ReferenceState(D) for client in CLIENTS}
    delta, share = ({client: np.zeros(D) for client in CLIENTS} for _ in range(2))
    for round in range(1, 6):
        ends = {}
        for client in WHO[round]:
            memory[client].start_round()
            w, total = w_g + delta[client], np.zeros(D)
            for t in range(STEPS):
                g = CURVATURE[client] * (w - CENTRE[client]) + NOISE[client, round][t]
                P, gamma = memory[client].step(g, delta[client])
                gamma = {"erf": gamma, "half": np.full(D, 0.5), "full": np.ones(D)}[correction]
                w = w - RATE * P * g - gamma * delta[client] / STEPS
                total += gamma
            ends[client] = w
            delta[client], share[client] = w - w_g, total / STEPS
        for client in CLIENTS:
            if client not in WHO[round]:
                delta[client] = delta[client] * (1 - share[client])
        weights = np.array([ROWS[client] for client in ends])
        w_g = (np.array(list(ends.values())) * weights[:, None]).sum(0) / weights.sum()
        shared.append(w_g)
    return shared, {client: w_g + delta[client] for client in CLIENTS}


@pytest.mark.parametrize("correction", ["erf", "half", "full"])
def test_five_rounds_with_missed_ones_are_the_reference(correction: str) -> None:
    found = run(stale_offset="decay", correction=correction)
    shared, starts = reference(correction)
    for mine, wanted in zip(found.shared, shared, strict=True):
        np.testing.assert_allclose(mine.numpy(), wanted, rtol=2e-4, atol=2e-5)
    for client in CLIENTS:
        own = found.realigned(client).numpy()
        np.testing.assert_allclose(own, starts[client], rtol=2e-4, atol=2e-5)
    kept = run(stale_offset="keep", correction=correction)
    assert float((kept.shared[-1] - found.shared[-1]).norm()) > 0.05  # it makes a difference
    assert torch.equal(kept.shared[3], found.shared[3])  # and none before they are back


@pytest.mark.parametrize("rounds", [2, 3, 4])
def test_a_client_that_is_away_is_scored_with_what_is_left(rounds: int) -> None:
    """Δ ⊙ (1-Γ)^k, by its state alone; what the state holds stays as it was."""
    found = run(rounds, stale_offset="decay")
    state = found.states["bob"].vectors
    before = run(2, stale_offset="decay").states["bob"].vectors
    assert all(torch.equal(state[name], before[name]) for name in before)
    left = state["offset"].double() * (1 - state["correction"].double()) ** (rounds - 2)
    wanted = found.shared[-1].double() + left
    torch.testing.assert_close(found.realigned("bob").double(), wanted, rtol=0, atol=1e-6)


def test_half_of_the_offset_goes_with_every_missed_round() -> None:
    """γ ≡ ½: halves are exact, so Δ is a quarter to the bit after two rounds."""
    kept, decayed = (run(4, stale_offset=way, correction="half") for way in ("keep", "decay"))
    offset = kept.states["bob"].vectors["offset"]
    assert torch.equal(decayed.states["bob"].vectors["correction"], torch.full((D,), 0.5))
    assert torch.equal(decayed.realigned("bob"), decayed.shared[-1] + offset / 4)
    assert torch.equal(kept.realigned("bob"), kept.shared[-1] + offset)
    again = run(stale_offset="decay", correction="half").summaries["bob", 5]
    assert again["offset_norm_before"] == pytest.approx(float(offset.norm()) / 4, rel=1e-6)
    assert again["missed_rounds"] == 2


def test_with_the_full_correction_one_missed_round_leaves_nothing() -> None:
    for rounds in (3, 4):
        found = run(rounds, stale_offset="decay", correction="full")
        assert torch.equal(found.realigned("bob"), found.shared[-1])
    assert run(stale_offset="decay", correction="full").summaries["bob", 5][
        "offset_norm_before"
    ] == pytest.approx(0)


@pytest.mark.parametrize("correction", ["erf", "half", "full", "hard"])
def test_who_misses_nothing_keeps_everything_to_the_bit(correction: str) -> None:
    everybody = dict.fromkeys(range(1, 6), CLIENTS)
    kept, decayed = (
        run(who=everybody, stale_offset=way, correction=correction) for way in ("keep", "decay")
    )
    assert all(torch.equal(*pair) for pair in zip(kept.shared, decayed.shared, strict=True))
    for client in CLIENTS:
        one, other = kept.states[client].vectors, decayed.states[client].vectors
        assert other.keys() - one.keys() == {"correction"}
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert torch.equal(kept.realigned(client), decayed.realigned(client))
    assert {s["missed_rounds"] for s in decayed.summaries.values()} == {0}


def test_nothing_is_counted_or_sent_where_nothing_decays() -> None:
    found = run()
    assert found.method.init_server(torch.zeros(D)).scalars == found.sent.scalars == {}
    fresh = found.method.init_client(ClientInfo("bob", 5, found.method.setup.layout), torch.ones(D))
    assert (len(fresh.vectors), fresh.scalars) == (4, {"turns": 0.0})
    assert found.states["bob"].scalars == {"turns": 1.0}
    assert "correction" not in found.states["bob"].vectors
    assert "missed_rounds" not in found.summaries["bob", 5]


def test_rounds_are_counted_by_server_and_client() -> None:
    found = run(3, stale_offset="decay")
    assert found.sent.scalars == {"rounds": 3.0}
    assert {client: found.states[client].scalars["rounds"] for client in CLIENTS} == {
        "alice": 3.0,
        "bob": 2.0,
        "carol": 3.0,
    }
    assert found.summaries["carol", 2]["missed_rounds"] == 1  # of an offset of 0
    assert found.summaries["carol", 2]["offset_norm_before"] == 0


def test_a_turn_whose_round_was_not_averaged_has_missed_none() -> None:
    """As when a round fails after some clients have had their turns: the server is where it was."""
    found = run(3, stale_offset="decay")
    earlier = run(2, stale_offset="decay").sent
    wanted = earlier.vectors["global_weights"] + found.states["alice"].vectors["offset"]
    own = found.method.candidates(earlier, found.states["alice"])["realigned"]
    assert torch.equal(own, wanted)


def test_a_failed_round_is_missed_by_nobody() -> None:
    """The server's count goes on by the rounds it averages, whatever their numbers are."""
    method = method_of(stale_offset="decay")
    start = torch.tensor(START).float()
    server = method.init_server(start)
    state = method.init_client(ClientInfo("alice", 3, method.setup.layout), start)
    for round in (1, 3, 4):  # round 2 came to nothing
        sent = method.broadcast(server, "alice")
        local = Quadratic("alice", round)
        upload, state = method.turn(sent, state, local)
        server = method.aggregate(server, [upload], round)
        assert local.summary["missed_rounds"] == 0
        own = method.candidates(method.broadcast(server, "alice"), state)["realigned"]
        assert torch.equal(own, server.vectors["global_weights"] + state.vectors["offset"])


def test_a_turn_leaves_what_it_was_given_alone() -> None:
    found = run(4, stale_offset="decay")
    client, sent = found.states["bob"], found.sent
    before = {name: vector.clone() for name, vector in client.vectors.items()}
    first = found.method.turn(sent, client, Quadratic("bob", 5))
    assert all(torch.equal(client.vectors[name], before[name]) for name in before)
    assert (client.scalars["rounds"], sent.scalars) == (2.0, {"rounds": 4.0})
    again = found.method.turn(sent, client, Quadratic("bob", 5))
    assert torch.equal(first[0].vectors["weights"], again[0].vectors["weights"])
    given = {vector.data_ptr() for vector in client.vectors.values()}
    assert given.isdisjoint(vector.data_ptr() for vector in first[1].vectors.values())


# --- whole runs -------------------------------------------------------------------------------


def tiny_run(folder: Path, **changes: Any) -> Path:
    """Run a recipe whose trace has bob in rounds 1, 2 and 5 only, and the others always."""
    folder.mkdir(parents=True)
    rows = [f"{n},{c}" for n in range(1, 6) for c in CLIENTS if c != "bob" or n not in (3, 4)]
    (folder / "trace.csv").write_text("\n".join(["round,client", *rows]))
    settings = {
        "federation.rounds": 5,
        "federation.availability": "trace.csv",
        "method.stale_offset": "decay",
        "training.learning_rate": 2.0,
    }
    return finetune(load_recipe(tiny_recipe(folder, **settings | changes))).folder


def summary(folder: Path, client: str, round: int) -> dict[str, float]:
    query = "SELECT summary FROM turns WHERE client = ? AND round = ?"
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        [(text,)] = ledger.execute(query, (client, round))
    return dict(json.loads(text))


def test_a_run_starts_who_was_away_with_what_is_left(tmp_path: Path) -> None:
    short = tiny_run(tmp_path / "four", **{"federation.rounds": 4})
    state = load_file(short / "clients" / "bob" / "state-2.safetensors")
    left = state["offset"] * (1 - state["correction"]) ** 2
    assert not torch.equal(state["correction"], torch.full_like(left, 0.5))
    assert 0.1 < float(left.norm() / state["offset"].norm()) < 0.6

    turn = summary(tiny_run(tmp_path / "five"), "bob", 5)

    assert turn["missed_rounds"] == 2
    assert turn["offset_norm_before"] == pytest.approx(float(left.norm()), rel=1e-5)
    kept = summary(tiny_run(tmp_path / "kept", **{"method.stale_offset": "keep"}), "bob", 5)
    assert kept["offset_norm_before"] == pytest.approx(float(state["offset"].norm()), rel=1e-5)
    with safe_open(short / "server" / "state-4.safetensors", "pt") as server:
        assert json.loads(server.metadata()["scalars"]) == {"rounds": 4.0}


def test_a_run_scores_who_is_away_with_what_is_left(tmp_path: Path) -> None:
    """Under the full correction bob's own model after a missed round is the shared one."""
    changes = {"federation.rounds": 3, "method.correction": "full"}
    folder = tiny_run(tmp_path / "run", **changes)
    clients = json.loads((folder / "adapters.json").read_text())["clients"]
    for client in CLIENTS:
        scores = clients[client]["scores"]["validation"]
        assert (scores["realigned"] == scores["global"]) == (client == "bob")


def test_a_plan_counts_the_share_among_the_state(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run")
    checked = check_recipe(tmp_path / "run" / "recipe.yaml", ["name=other"])
    plan = make_plan(checked.loaded, checked.clients)
    held = load_file(folder / "clients" / "bob" / "state-5.safetensors")
    assert plan.traffic.state == {name: 4 * each.numel() for name, each in held.items()}
    assert "correction" in plan.traffic.state
    assert plan.traffic.down == plan.traffic.up == 4 * plan.layout.d

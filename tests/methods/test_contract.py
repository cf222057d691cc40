"""What every method keeps to, turn by turn: what it leaves alone, and what it is blind to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from pfl_lm.export.card_sections import CANDIDATES
from pfl_lm.layout import Vector
from pfl_lm.methods import (
    METHODS,
    Broadcast,
    ClientInfo,
    ClientState,
    Method,
    ServerState,
    Setup,
    Upload,
)
from pfl_lm.methods.base import SHARED
from pfl_lm.recipe.methods import METHOD_OPTIONS
from pfl_lm.train import LocalTrainer
from tests.world import World, make_world, options

CLIENTS = {"alice": ("alice", 1), "bob": ("bob", 2), "carol": ("carol", 3)}
RATE = 1.0
SEVERAL = [name for name in METHODS if name != "local"]
"""Methods by which clients learn from each other."""


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def method_of(world: World, name: str, n_clients: int = 3) -> Method:
    setup = Setup(world.adapter.layout, n_clients, 0, options(learning_rate=RATE))
    return METHODS[name](METHOD_OPTIONS[name].model_validate({"name": name}), setup)


def new_client(world: World, method: Method, client: str) -> ClientState:
    return method.init_client(ClientInfo(client, 8, world.adapter.layout), world.start)


def trainer(world: World, rows: str, seed: int) -> LocalTrainer:
    n_rows = {"alice": 7, "bob": 5}.get(rows, 4)
    own = world.examples(rows, n_rows=n_rows)
    return world.trainer(rows=own, seed=seed, steps=2, learning_rate=RATE)


def federate(
    world: World, method: Method, clients: Mapping[str, tuple[str, int]], rounds: int = 2
) -> tuple[ServerState, dict[str, ClientState], list[Upload]]:
    """Let the clients, in the order given, train on (whose rows, which seed) for some rounds."""
    server = method.init_server(world.start)
    states = {client: new_client(world, method, client) for client in clients}
    uploads: list[Upload] = []
    for round in range(1, rounds + 1):
        uploads = []
        for client, (rows, seed) in clients.items():
            run = trainer(world, rows, 100 * round + seed)
            sent = method.broadcast(server, client)
            upload, states[client] = method.turn(sent, states[client], run)
            uploads.append(upload)
        server = method.aggregate(server, uploads, round)
    return server, states, uploads


State = ServerState | ClientState | Broadcast | Upload
T = TypeVar("T", bound=State)


def copy(state: T) -> T:
    vectors = {name: vector.clone() for name, vector in state.vectors.items()}
    return replace(state, vectors=vectors, scalars=dict(state.scalars))


def same(one: State, other: State) -> bool:
    return (
        one.scalars == other.scalars
        and one.vectors.keys() == other.vectors.keys()
        and all(torch.equal(one.vectors[n], other.vectors[n]) for n in one.vectors)
    )


def places(*states: State) -> set[int]:
    return {vector.data_ptr() for state in states for vector in state.vectors.values()}


@pytest.mark.parametrize("name", METHODS)
def test_a_turn_leaves_what_it_was_given_alone(world: World, name: str) -> None:
    method = method_of(world, name)
    server, states, _ = federate(world, method, CLIENTS)
    sent, client = method.broadcast(server, "bob"), states["bob"]
    before = copy(sent), copy(client)

    upload, kept = method.turn(sent, client, trainer(world, "bob", 8))

    assert same(sent, before[0])
    assert same(client, before[1])
    assert places(sent, client).isdisjoint(places(kept))
    again, kept_again = method.turn(sent, client, trainer(world, "bob", 8))
    assert same(again, upload)
    assert again.weight == upload.weight
    assert same(kept_again, kept)
    assert not same(kept, client)


@pytest.mark.parametrize("name", METHODS)
def test_aggregate_leaves_the_server_and_the_uploads_alone(world: World, name: str) -> None:
    method = method_of(world, name)
    _, _, uploads = federate(world, method, CLIENTS, rounds=1)
    server = method.init_server(world.start)
    before = copy(server), [copy(upload) for upload in uploads]

    after = method.aggregate(server, uploads, 1)

    assert same(server, before[0])
    assert all(same(one, other) for one, other in zip(uploads, before[1], strict=True))
    assert same(method.aggregate(server, uploads, 1), after)
    assert same(after, server) == (name == "local")


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_the_clients_does_not_matter(world: World, name: str) -> None:
    """Neither that of their turns nor that of the average."""
    server, states, _ = federate(world, method_of(world, name), CLIENTS)
    backwards = dict(reversed(CLIENTS.items()))
    server_again, states_again, _ = federate(world, method_of(world, name), backwards)
    close(server_again.vectors, server.vectors)
    for client in CLIENTS:
        close(states_again[client].vectors, states[client].vectors)


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for vector in other:
        torch.testing.assert_close(one[vector], other[vector], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_clients_with_equal_data_and_seeds_are_one_client(world: World, name: str) -> None:
    alike = dict.fromkeys(("first", "second", "third"), ("alice", 1))
    server, states, _ = federate(world, method_of(world, name), alike, rounds=3)
    assert same(states["first"], states["second"])
    assert same(states["first"], states["third"])
    alone = {"first": ("alice", 1)}
    server_alone, states_alone, _ = federate(world, method_of(world, name, 1), alone, rounds=3)
    assert same(states_alone["first"], states["first"])
    assert server_alone.vectors.keys() == server.vectors.keys()
    for vector in server.vectors:
        assert torch.equal(server_alone.vectors[vector], server.vectors[vector])


@pytest.mark.parametrize("name", SEVERAL)
def test_clients_learn_from_each_other(world: World, name: str) -> None:
    """Without this, everything above would hold of a method that shares nothing."""
    _, together, _ = federate(world, method_of(world, name), CLIENTS, rounds=3)
    alone = {"alice": CLIENTS["alice"]}
    _, apart, _ = federate(world, method_of(world, name, 1), alone, rounds=3)
    assert not same(together["alice"], apart["alice"])


@pytest.mark.parametrize("name", METHODS)
def test_before_any_training_every_candidate_is_the_backbone(world: World, name: str) -> None:
    """And nobody needs to have taken a turn to be scored, nor the server to have had a round."""
    method = method_of(world, name)
    layout, server = world.adapter.layout, method.init_server(world.start)
    found = method.candidates(method.broadcast(server, ""), new_client(world, method, "dora"))
    for vector in found.values():
        assert vector.shape == (layout.d,)
        assert not layout.factor(vector, "B").any()
        assert torch.equal(layout.factor(vector, "A"), layout.factor(world.start, "A"))


@pytest.mark.parametrize("name", METHODS)
def test_candidates_are_known_by_name_and_hold_what_they_say(world: World, name: str) -> None:
    method = method_of(world, name)
    server, states, uploads = federate(world, method, CLIENTS)
    sent = method.broadcast(server, "")
    found = {client: method.candidates(sent, state) for client, state in states.items()}
    names = list(found["alice"])
    assert set(names) < CANDIDATES.keys()
    assert "local" in names  # what no other method's shared model may be compared with
    for client, upload in zip(CLIENTS, uploads, strict=True):
        assert torch.equal(found[client]["local"], states[client].vectors["weights"])
        for part, vector in upload.vectors.items():
            local = found[client]["local"]
            own = local if part == "weights" else world.adapter.layout.factor(local, part)
            assert torch.equal(vector, own)
    if "global" in names:
        assert torch.equal(found["alice"]["global"], found["bob"]["global"])
    assert not torch.equal(found["alice"]["local"], found["bob"]["local"])


@pytest.mark.parametrize("name", METHODS)
def test_an_upload_answers_what_was_sent(world: World, name: str) -> None:
    """By its name, so that it can be checked before it counts; mostly it weighs by the rows."""
    method = method_of(world, name)
    _, _, uploads = federate(world, method, CLIENTS, rounds=1)
    sent = method.broadcast(method.init_server(world.start), "")
    for upload in uploads:
        assert len(upload.vectors) == (name != "local")  # client-level noise is for one
        for part, vector in upload.vectors.items():
            assert vector.shape == sent.vectors[f"{SHARED}{part}"].shape
    weights = [upload.weight for upload in uploads]
    assert weights == {"local": [0, 0, 0], "scaffold": [1, 1, 1], "hetlora": [1, 1, 1]}.get(
        name, [7, 5, 4]
    )


class Counting(LocalTrainer):
    """Note how many steps each fit was asked for."""

    fits: list[int]

    def train(self, start: Vector, *, steps: int, **how: Any) -> Vector:
        self.fits = [*getattr(self, "fits", []), steps]
        return super().train(start, steps=steps, **how)


@pytest.mark.parametrize("name", METHODS)
def test_a_turn_takes_as_many_steps_as_the_method_says(world: World, name: str) -> None:
    method = method_of(world, name)
    run = trainer(world, "alice", 1)
    run.__class__ = Counting
    sent = method.broadcast(method.init_server(world.start), "")
    method.turn(sent, new_client(world, method, "alice"), run)
    assert run.fits == [2] * method.fits  # type: ignore[attr-defined]
    assert run.summary["steps_done"] == 2 * method.fits

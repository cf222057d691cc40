"""pFLAlign's turns, driven one by one: what is kept, what is sent, and who sees what."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pfl_lm.methods import Broadcast, ClientInfo, ClientState, Setup, Upload
from pfl_lm.methods.pflalign import PFLAlign
from pfl_lm.recipe import PFLAlignOptions
from tests.world import World, make_world, options

CLIENTS = ("alice", "bob", "carol")
ADAMW_FORM = {"precondition_target": "update", "update_scale": "match"}
OFF = {"personalized_start": False, "correction": "none"}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def method_of(world: World, **switches: Any) -> PFLAlign:
    chosen = PFLAlignOptions.model_validate({"name": "pflalign", **switches})
    setup = Setup(world.adapter.layout, len(CLIENTS), 0, options(learning_rate=2.0))
    return PFLAlign(chosen, setup)


def new_client(world: World, method: PFLAlign, client: str) -> ClientState:
    return method.init_client(ClientInfo(client, 8, world.adapter.layout), world.vector())


def turns(
    world: World, method: PFLAlign, clients: dict[str, tuple[str, int]], rounds: int = 2
) -> tuple[Tensor, dict[str, ClientState], list[Upload]]:
    """Let the clients, in the order given, train on (whose rows, which seed) for some rounds."""
    server = method.init_server(world.vector())
    states = {client: new_client(world, method, client) for client in clients}
    uploads: list[Upload] = []
    for round in range(1, rounds + 1):
        uploads = []
        for client, (rows, seed) in clients.items():
            run = world.trainer(client=rows, seed=100 * round + seed, learning_rate=2.0)
            sent = method.broadcast(server, client)
            upload, states[client] = method.turn(sent, states[client], run)
            uploads.append(upload)
        server = method.aggregate(server, uploads, round)
    return server.vectors["global_weights"], states, uploads


def copies(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: vector.clone() for name, vector in vectors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("switches", [{}, ADAMW_FORM], ids=["published", "on the update"])
def test_clients_with_equal_data_and_seeds_stay_identical(
    world: World, switches: dict[str, Any]
) -> None:
    """(l) To the bit, and so is their average."""
    alike = dict.fromkeys(("first", "second", "third"), ("alice", 1))
    shared, states, uploads = turns(world, method_of(world, **switches), alike, rounds=3)
    assert same(states["first"].vectors, states["second"].vectors)
    assert same(states["first"].vectors, states["third"].vectors)
    assert torch.equal(shared, uploads[0].vectors["weights"])
    assert float(states["first"].vectors["offset"].norm()) > 0.01

    alone, _, _ = turns(world, method_of(world, **switches), {"first": ("alice", 1)}, rounds=3)
    assert torch.equal(shared, alone)


def test_the_order_of_the_clients_does_not_matter(world: World) -> None:
    """(g) Neither the order of their turns nor that of the average; w_g to 1e-6."""
    clients = {client: (client, seed) for seed, client in enumerate(CLIENTS)}
    wanted, kept, _ = turns(world, method_of(world), clients)
    assert float((wanted - world.vector()).norm()) > 0.01
    for order in itertools.permutations(CLIENTS):
        shared, states, _ = turns(world, method_of(world), {c: clients[c] for c in order})
        torch.testing.assert_close(shared, wanted, rtol=0, atol=1e-6)
        for client in CLIENTS:
            torch.testing.assert_close(
                states[client].vectors["offset"], kept[client].vectors["offset"], rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("switches", [{}, ADAMW_FORM, OFF, {"preconditioner": False}])
def test_a_turn_leaves_what_it_was_given_alone(world: World, switches: dict[str, Any]) -> None:
    method = method_of(world, **switches)
    _, states, _ = turns(world, method, {"alice": ("alice", 1)})
    client, sent = states["alice"], Broadcast({"global_weights": world.vector(seed=8)})
    before = copies(client.vectors), copies(sent.vectors)

    first, kept = method.turn(sent, client, world.trainer(learning_rate=2.0))

    assert same(client.vectors, before[0])
    assert same(sent.vectors, before[1])
    given = {vector.data_ptr() for vector in (*client.vectors.values(), *sent.vectors.values())}
    assert given.isdisjoint(vector.data_ptr() for vector in kept.vectors.values())
    # Hence the same turn can be taken again, and ends the same.
    second, kept_again = method.turn(sent, client, world.trainer(learning_rate=2.0))
    assert same(first.vectors, second.vectors)
    assert same(kept.vectors, kept_again.vectors)
    assert not same(kept.vectors, client.vectors)


def test_only_the_weights_leave_a_client(world: World) -> None:
    method = method_of(world)
    rows = world.examples("bob", n_rows=5)
    run = world.trainer(rows=rows, learning_rate=2.0)
    sent = Broadcast({"global_weights": world.vector(seed=8)})
    client = new_client(world, method, "bob")
    client.vectors["offset"] = world.vector(seed=3) - world.vector()

    upload, kept = method.turn(sent, client, run)

    assert upload.vectors.keys() == {"weights"}
    assert (upload.weight, upload.scalars) == (5, {})
    assert kept.vectors.keys() == {"weights", "offset", "second_moment", "preconditioner"}
    assert torch.equal(kept.vectors["weights"], upload.vectors["weights"])
    wanted = upload.vectors["weights"] - sent.vectors["global_weights"]
    assert torch.equal(kept.vectors["offset"], wanted)
    assert float(kept.vectors["second_moment"].min()) > 0
    assert run.summary["offset_norm"] == pytest.approx(float(wanted.norm()))
    assert run.summary["skipped_steps"] == 0


def test_clients_see_the_shared_weights_and_nothing_else(world: World) -> None:
    method = method_of(world)
    server = method.init_server(world.vector())
    sent = method.broadcast(server, "alice")
    assert sent.vectors.keys() == {"global_weights"}
    assert torch.equal(sent.vectors["global_weights"], world.vector())
    assert sent.scalars == {}


def test_the_average_weighs_by_training_examples(world: World) -> None:
    method = method_of(world)
    one, other = world.vector(seed=1), world.vector(seed=2)
    uploads = [Upload({"weights": one}, 3), Upload({"weights": other}, 1)]
    server = method.aggregate(method.init_server(world.start), uploads, 1)
    wanted = (0.75 * one.double() + 0.25 * other.double()).float()
    torch.testing.assert_close(server.vectors["global_weights"], wanted, rtol=1e-6, atol=1e-9)


def test_the_first_round_starts_from_the_shared_weights(world: World) -> None:
    """Offset, v and P are 0, so the realigned start is w_g itself."""
    fresh = new_client(world, method_of(world), "alice").vectors
    assert all(
        fresh[name].count_nonzero() == 0 for name in ("offset", "second_moment", "preconditioner")
    )


@pytest.mark.parametrize("personalized", [True, False])
def test_a_turn_starts_where_the_switches_say(
    world: World, monkeypatch: pytest.MonkeyPatch, personalized: bool
) -> None:
    method = method_of(world, **({} if personalized else OFF))
    client = new_client(world, method, "alice")
    offset = world.vector(seed=3) - world.vector()
    client.vectors["offset"] = offset
    sent, run = Broadcast({"global_weights": world.vector()}), world.trainer()
    starts: list[Tensor] = []
    monkeypatch.setattr(run, "train", lambda start, **how: starts.append(start) or start)

    method.turn(sent, client, run)

    wanted = world.vector() + offset if personalized else world.vector()
    assert torch.equal(starts[0], wanted)


def test_candidates_come_with_the_methods_own_first(world: World) -> None:
    method = method_of(world)
    _, states, _ = turns(world, method, {"alice": ("alice", 1)})
    client, shared = states["alice"], world.vector(seed=8)

    found = dict(method.candidates(Broadcast({"global_weights": shared}), client))

    assert list(found) == ["realigned", "local", "global"]
    assert torch.equal(found["realigned"], shared + client.vectors["offset"])
    assert torch.equal(found["local"], client.vectors["weights"])
    assert torch.equal(found["global"], shared)


def test_without_a_personal_start_the_shared_weights_are_its_own(world: World) -> None:
    method = method_of(world, **OFF)
    _, states, _ = turns(world, method, {"alice": ("alice", 1)})
    found = dict(method.candidates(Broadcast({"global_weights": world.start}), states["alice"]))
    assert list(found) == ["global", "local"]
    assert torch.equal(found["global"], world.start)
    assert torch.equal(found["local"], states["alice"].vectors["weights"])

"""Methods that treat A and B apart: which of them moves, which of them travels, exact averages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pfl_lm.layout import Factor, Vector
from pfl_lm.methods import METHODS, ClientInfo, ClientState, Method, ServerState, Setup, Upload
from pfl_lm.methods.combine import combine
from pfl_lm.recipe import AggregationOptions
from pfl_lm.recipe.methods import METHOD_OPTIONS
from tests.world import World, make_world, options

CLIENTS = {"alice": 7, "bob": 5, "carol": 4}
RATE = 2.0
RULES = [
    AggregationOptions(rule="clipped_mean", clip_norm=0.002),
    AggregationOptions(rule="median"),
    AggregationOptions(rule="trimmed_mean", trim_fraction=0.34),
]


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def method_of(world: World, name: str, how: AggregationOptions | None = None) -> Method:
    training = options(learning_rate=RATE)
    setup = Setup(world.adapter.layout, 3, 0, training, how or AggregationOptions())
    return METHODS[name](METHOD_OPTIONS[name].model_validate({"name": name}), setup)


def new_client(world: World, method: Method) -> ClientState:
    return method.init_client(ClientInfo("", 8, world.adapter.layout), world.start)


class Federation:
    """Three clients of unequal sizes, round by round."""

    def __init__(self, world: World, method: Method) -> None:
        self.world, self.method = world, method
        self.server = method.init_server(world.start)
        self.states = {client: new_client(world, method) for client in CLIENTS}
        self.rounds = 0

    def round(self) -> list[Upload]:
        self.rounds += 1
        uploads = []
        for client, n_rows in CLIENTS.items():
            rows = self.world.examples(client, n_rows=n_rows)
            run = self.world.trainer(rows=rows, seed=self.rounds, steps=2, learning_rate=RATE)
            sent = self.method.broadcast(self.server, client)
            upload, self.states[client] = self.method.turn(sent, self.states[client], run)
            uploads.append(upload)
        self.server = self.method.aggregate(self.server, uploads, self.rounds)
        return uploads


def products(world: World, vector: Vector) -> list[Tensor]:
    """Return B A of every adapted matrix, in float64."""
    named = world.adapter.layout.split(vector.double())
    return [named[b.name] @ named[a.name] for a, b in world.adapter.layout.pairs]


def gap(world: World, shared: Vector, locals: list[Vector]) -> float:
    """Return how far B A of the mean is from the mean of all B A, by the latter's own size."""
    weights = [n / sum(CLIENTS.values()) for n in CLIENTS.values()]
    each = [products(world, vector) for vector in locals]
    worst = 0.0
    for i, product in enumerate(products(world, shared)):
        mean = sum(w * of_client[i] for w, of_client in zip(weights, each, strict=True))
        worst = max(worst, float((product - mean).norm() / torch.as_tensor(mean).norm()))
    return worst


def global_weights(federation: Federation) -> Vector:
    sent = federation.method.broadcast(federation.server, "")
    return federation.method.candidates(sent, new_client(federation.world, federation.method))[
        "global"
    ]


@pytest.mark.parametrize("name", ["ffa_lora", "rolora"])
def test_the_average_of_the_products_is_the_product_of_the_averages(
    world: World, name: str
) -> None:
    """Of FedAvg it is not."""
    exact, inexact = (
        Federation(world, method_of(world, name)),
        Federation(world, method_of(world, "fedavg")),
    )
    for round in range(1, 4):
        for federation in (exact, inexact):
            federation.round()
        ends = {
            federation: [state.vectors["weights"] for state in federation.states.values()]
            for federation in (exact, inexact)
        }
        assert gap(world, global_weights(exact), ends[exact]) < 1e-6
        assert round == 1 or gap(world, global_weights(inexact), ends[inexact]) > 1e-5


@pytest.mark.parametrize("name", ["ffa_lora", "fedsa_lora", "rolora"])
def test_the_factor_that_is_not_trained_stays_bit_for_bit(world: World, name: str) -> None:
    layout, federation = world.adapter.layout, Federation(world, method_of(world, name))
    for round in range(1, 5):
        sent = federation.method.broadcast(federation.server, "")
        before = {
            client: next(iter(federation.method.candidates(sent, state).values()))
            for client, state in federation.states.items()
        }
        uploads = federation.round()
        trained = {"ffa_lora": "B", "fedsa_lora": "AB", "rolora": "B" if round % 2 else "A"}[name]
        for client, state in federation.states.items():
            factor: Factor
            for factor in ("A", "B"):
                start, end = (
                    layout.factor(v, factor) for v in (before[client], state.vectors["weights"])
                )
                assert torch.equal(start, end) == (factor not in trained)
        travels = "A" if name == "fedsa_lora" else trained
        assert [list(upload.vectors) for upload in uploads] == [[travels]] * 3


def test_ffa_keeps_the_first_draw_of_a_and_sends_none_of_it(world: World) -> None:
    federation = Federation(world, method_of(world, "ffa_lora"))
    for _ in range(2):
        federation.round()
    layout = world.adapter.layout
    first = layout.factor(world.start, "A")
    for vector in (global_weights(federation), federation.states["bob"].vectors["weights"]):
        assert torch.equal(layout.factor(vector, "A"), first)
    sent = federation.method.broadcast(federation.server, "")
    assert {name: len(v) for name, v in sent.vectors.items()} == {"global_B": layout.d - len(first)}


def test_fedsa_gives_nobody_anothers_b(world: World) -> None:
    """Not even what a server could average: it has no B, neither from the start nor sent."""
    federation = Federation(world, method_of(world, "fedsa_lora"))
    for _ in range(2):
        federation.round()
    layout, method = world.adapter.layout, federation.method
    sent = method.broadcast(federation.server, "")
    assert federation.server.vectors.keys() == sent.vectors.keys() == {"global_A"}
    models = {
        client: method.candidates(sent, state)["personal"]
        for client, state in federation.states.items()
    }
    for client, model in models.items():
        own = federation.states[client].vectors["weights"]
        assert torch.equal(layout.factor(model, "B"), layout.factor(own, "B"))
        assert torch.equal(layout.factor(model, "A"), sent.vectors["global_A"])
    bs = [layout.factor(model, "B") for model in models.values()]
    assert not any(torch.equal(bs[0], other) for other in bs[1:])


def test_who_has_missed_rounds_of_rolora_is_sent_all_it_needs(world: World) -> None:
    federation = Federation(world, method_of(world, "rolora"))
    for _ in range(3):
        federation.round()
    server = federation.server
    assert server.scalars == {"rounds": 3.0}
    assert torch.equal(global_weights(federation), server.vectors["global_weights"])
    late = new_client(world, federation.method)
    upload, _ = federation.method.turn(
        federation.method.broadcast(server, ""), late, world.trainer(steps=1, learning_rate=RATE)
    )
    assert upload.vectors.keys() == {"A"}  # round 4


@pytest.mark.parametrize("how", RULES, ids=lambda how: how.rule)
@pytest.mark.parametrize("name", ["ffa_lora", "fedsa_lora", "rolora"])
def test_a_robust_rule_is_of_the_factor_that_travels(
    world: World, name: str, how: AggregationOptions
) -> None:
    layout = world.adapter.layout
    plain, robust = (method_of(world, name, rule) for rule in (None, how))
    federation = Federation(world, plain)
    start = federation.server
    uploads = federation.round()
    [(factor, _)] = uploads[0].vectors.items()

    def part(server: ServerState) -> Any:
        if "global_A" in server.vectors:
            return server.vectors["global_A"]
        return layout.factor(server.vectors["global_weights"], "B")

    found = robust.aggregate(start, uploads, 1)
    wanted = combine(robust.setup, 1, part(start), uploads, factor)
    assert torch.equal(part(found), wanted)
    assert not torch.equal(part(found), part(federation.server))
    if name != "fedsa_lora":
        for server in (start, found):
            a = layout.factor(server.vectors["global_weights"], "A")
            assert torch.equal(a, layout.factor(world.start, "A"))

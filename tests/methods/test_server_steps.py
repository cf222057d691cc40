"""Servers that do more than average, on a few numbers that can be worked out on paper."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from pfl_lm.layout import AdapterLayout
from pfl_lm.methods import METHODS, Method, ServerState, Setup, Upload
from pfl_lm.methods.combine import combine
from pfl_lm.recipe import AggregationOptions
from pfl_lm.recipe.methods import METHOD_OPTIONS
from tests.world import options

LAYOUT = AdapterLayout.of([("q", "A", (1,)), ("q", "B", (1,))])
RULES = [
    AggregationOptions(rule="clipped_mean", clip_norm=0.5),
    AggregationOptions(rule="median"),
    AggregationOptions(rule="trimmed_mean", trim_fraction=0.34),
]
OWN: dict[str, dict[str, Any]] = {
    "fedavgm": {"server_momentum": 0.5, "server_learning_rate": 2.0},
    "fedadam": {"server_learning_rate": 2.0, "beta_1": 0.5, "beta_2": 0.5, "tau": 1.0},
}


def method_of(name: str, how: AggregationOptions | None = None, **own: Any) -> Method:
    setup = Setup(LAYOUT, 3, 0, options(learning_rate=0.5), how or AggregationOptions())
    chosen = METHOD_OPTIONS[name].model_validate({"name": name, **OWN.get(name, {}), **own})
    return METHODS[name](chosen, setup)


def sent(*ends: list[float], weights: tuple[float, ...] | None = None) -> list[Upload]:
    weighed = zip(ends, weights or (1.0,) * len(ends), strict=True)
    return [Upload({"weights": torch.tensor(end)}, weight) for end, weight in weighed]


def shared(server: ServerState) -> list[float]:
    return server.vectors["global_weights"].tolist()


def test_momentum_by_hand() -> None:
    """w = 1; D = 3, u = 3, w = 7; D = 4 - 7 = -3, u = 1.5 - 3 = -1.5, w = 4."""
    method = method_of("fedavgm")
    server = method.init_server(torch.tensor([1.0, 1.0]))
    server = method.aggregate(server, sent([3.0, 1.0], [7.0, 1.0], weights=(3.0, 1.0)), 1)
    assert shared(server) == [7.0, 1.0]
    assert server.vectors["velocity"].tolist() == [3.0, 0.0]
    server = method.aggregate(server, sent([4.0, 1.0]), 2)
    assert shared(server) == [4.0, 1.0]
    assert server.vectors["velocity"].tolist() == [-1.5, 0.0]


def test_a_steady_change_leads_to_steps_of_one_over_one_minus_beta() -> None:
    method = method_of("fedavgm", server_momentum=0.9, server_learning_rate=1.0)
    server = method.init_server(torch.zeros(2))
    for round in range(1, 200):
        before = server
        at = server.vectors["global_weights"]
        server = method.aggregate(server, sent([float(at[0]) + 0.01, float(at[1])]), round)
    step = server.vectors["global_weights"] - before.vectors["global_weights"]
    assert step.tolist() == pytest.approx([0.1, 0.0], rel=1e-3)


def test_adam_by_hand() -> None:
    """w = 0, τ = 1: D = 4, m = 2, v = ½ 1 + ½ 16 = 8.5; then D = -1, m = 0.5, v = 4.75."""
    method = method_of("fedadam")
    server = method.init_server(torch.zeros(2))
    assert server.vectors["second_moment"].tolist() == [1.0, 1.0]
    server = method.aggregate(server, sent([4.0, 0.0]), 1)
    first = 2 * 2 / (sqrt(8.5) + 1)
    assert shared(server) == pytest.approx([first, 0.0])
    server = method.aggregate(server, sent([first - 1, 0.0]), 2)
    assert shared(server) == pytest.approx([first + 2 * 0.5 / (sqrt(4.75) + 1), 0.0])
    moments = [server.vectors[f"{which}_moment"].tolist() for which in ("first", "second")]
    assert moments == [[0.5, 0.0], [4.75, 0.25]]


def test_where_a_change_is_large_adam_steps_by_its_rate() -> None:
    """With β = 0 and D far above τ a step is η_s sign(D); far below, it is η_s D / τ."""
    method = method_of("fedadam", beta_1=0.0, beta_2=0.0, tau=1e-3, server_learning_rate=0.25)
    server = method.init_server(torch.zeros(2))
    server = method.aggregate(server, sent([-1e6, 1e-8]), 1)
    assert shared(server) == pytest.approx([-0.25, 0.25 * 1e-5], rel=1e-4)


@pytest.mark.parametrize("how", RULES, ids=lambda how: how.rule)
@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_a_robust_rule_settles_what_the_change_is(name: str, how: AggregationOptions) -> None:
    """As if everybody had sent what the rule makes of the uploads."""
    method = method_of(name, how)
    start = torch.tensor([1.0, -1.0])
    server = method.init_server(start)
    uploads = sent([1.1, -1.0], [1.2, -1.3], [1e9, -5.0])
    found = method.aggregate(server, uploads, 1)
    combined: Tensor = combine(method.setup, 1, start, uploads, "weights")
    plain = method_of(name)
    wanted = plain.aggregate(plain.init_server(start), sent(combined.tolist()), 1)
    assert shared(found) == shared(wanted)
    assert shared(found) != shared(plain.aggregate(server, uploads, 1))

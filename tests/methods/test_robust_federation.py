"""What robust rules do to a federation: to a minority that is honest, and to one who is not.

Clients are quadratics, F_k(w) = ½‖w - c_k‖², small enough for every number to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from pfl_lm.layout import AdapterLayout
from pfl_lm.methods import METHODS, ClientInfo, ClientState, Method, ServerState, Setup, Upload
from pfl_lm.recipe import AggregationOptions
from pfl_lm.recipe.methods import METHOD_OPTIONS
from tests.world import options

MEAN = AggregationOptions()
MEDIAN = AggregationOptions(rule="median")
TRIMMED = AggregationOptions(rule="trimmed_mean", trim_fraction=0.25)  # two of nine on each side
CLIPPED = AggregationOptions(rule="clipped_mean", clip_norm=1.0)

# All agree on the first coordinate. Of the second, seven want about 0 and two want about 3.
MAJORITY = [(1.0, second) for second in (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3)]
MINORITY = [(1.0, 3.0), (1.0, 3.2)]
GOALS = [torch.tensor(goal) for goal in (*MAJORITY, *MINORITY)]
LAYOUT = AdapterLayout.of([("q", "A", (1,)), ("q", "B", (1,))])
WHERE_MEAN, WHERE_ROBUST = 6.2 / 9, 0.1
"""The second coordinate's mean, and both its median and its mean without two on each side."""


@dataclass
class Quadratic:
    """A client's turn: ``train`` goes ``share`` of the way to its goal."""

    goal: Tensor
    share: float = 1.0
    steps: int = 1
    n_examples: int = 1
    n_tokens: int = 1
    learning_rate: float = 1.0
    summary: dict[str, float] = field(default_factory=dict)

    def train(self, start: Tensor, **how: Any) -> Tensor:
        return start + self.share * (self.goal - start)

    def loss_and_grad(self, at: Tensor, batch: Mapping[str, Any]) -> tuple[float, Tensor]:
        raise NotImplementedError


Attack = Callable[[Tensor, list[Upload]], Upload]


def federation(
    how: AggregationOptions,
    *,
    name: str = "fedavg",
    rounds: int = 1,
    share: float = 1.0,
    attack: Attack | None = None,
    goals: Sequence[Tensor] = GOALS,
) -> tuple[Method, ServerState, list[ClientState]]:
    """Run the nine from w_g = 0, and after them one who sends what ``attack`` says."""
    setup = Setup(LAYOUT, len(goals), 0, options(), how)
    method = METHODS[name](METHOD_OPTIONS[name].model_validate({"name": name}), setup)
    server = method.init_server(torch.zeros(2))
    info = ClientInfo("", 1, LAYOUT)
    states = [method.init_client(info, torch.zeros(2)) for _ in goals]
    for round in range(1, rounds + 1):
        uploads = []
        for k, goal in enumerate(goals):
            sent = method.broadcast(server, str(k))
            upload, states[k] = method.turn(sent, states[k], Quadratic(goal, share))
            uploads.append(upload)
        if attack is not None:
            uploads.append(attack(server.vectors["global_weights"], uploads))
        server = method.aggregate(server, uploads, round)
    return method, server, states


def shared(how: AggregationOptions, **settings: Any) -> list[float]:
    _, server, _ = federation(how, **settings)
    return [float(number) for number in server.vectors["global_weights"]]


def losses(at: list[float]) -> list[float]:
    return [float((torch.tensor(at) - goal).square().sum()) / 2 for goal in GOALS]


@pytest.mark.parametrize("rule", [MEDIAN, TRIMMED], ids=["median", "trimmed"])
@pytest.mark.parametrize("rounds", [1, 8])
def test_an_honest_minority_is_heard_by_the_mean_and_by_no_sorted_rule(
    rule: AggregationOptions, rounds: int
) -> None:
    fair, robust = shared(MEAN, rounds=rounds), shared(rule, rounds=rounds)
    assert fair == pytest.approx([1.0, WHERE_MEAN])
    assert robust == pytest.approx([1.0, WHERE_ROBUST])
    assert losses(fair)[-1] == pytest.approx((3.2 - WHERE_MEAN) ** 2 / 2)
    assert losses(robust)[-1] == pytest.approx(3.1**2 / 2)
    assert max(losses(robust)[:7]) < max(losses(fair)[:7])
    assert losses(robust)[-1] > 1.5 * losses(fair)[-1]


@pytest.mark.parametrize("rule", [MEDIAN, TRIMMED], ids=["median", "trimmed"])
def test_how_far_the_minority_lies_makes_no_difference_to_a_sorted_rule(
    rule: AggregationOptions,
) -> None:
    goals = [*GOALS[:7], torch.tensor([1.0, 3e6]), torch.tensor([1.0, 3e6])]
    assert shared(rule, goals=goals) == shared(rule)
    assert shared(MEAN, goals=goals)[1] == pytest.approx(6e6 / 9)


def test_clipping_leaves_a_minority_its_direction_and_takes_its_length() -> None:
    """d of the last two has lengths √10 and √11.24, of which C = 1 is left; so have the others."""
    lengths = [float(goal.norm()) for goal in GOALS]
    kept = sum(float(goal[1]) / length for goal, length in zip(GOALS, lengths, strict=True)) / 9
    found = shared(CLIPPED)
    assert found[1] == pytest.approx(kept)
    assert WHERE_ROBUST < found[1] == pytest.approx(0.2114, abs=1e-4)
    assert found[1] < WHERE_MEAN / 3
    # In the end the seven stand within C and pull with 7 x, the two with C each: x = 2/7.
    assert shared(CLIPPED, rounds=50) == pytest.approx([1.0, 2 / 7])


@pytest.mark.parametrize(
    ("rule", "where"), [(MEAN, WHERE_MEAN), (MEDIAN, WHERE_ROBUST), (TRIMMED, WHERE_ROBUST)]
)
def test_under_pflalign_the_offset_carries_what_the_rule_leaves_out(
    rule: AggregationOptions, where: float
) -> None:
    """Clients end at their goals all the same: w_g + Δ_k = c_k. What differs is what is shared."""
    method, server, states = federation(rule, name="pflalign", rounds=60, share=0.5)
    at = server.vectors["global_weights"]
    torch.testing.assert_close(at, torch.tensor([1.0, where]))
    for goal, state in zip(GOALS, states, strict=True):
        torch.testing.assert_close(state.vectors["offset"], goal - at, rtol=1e-5, atol=1e-6)
        realigned = method.candidates(method.broadcast(server, ""), state)["realigned"]
        torch.testing.assert_close(realigned, goal, rtol=1e-5, atol=1e-6)
    assert float(states[8].vectors["offset"][1]) == pytest.approx(3.2 - where, rel=1e-4)


def turned(scale: float, weight: float = 1.0) -> Attack:
    """One who sends the others' mean change, turned round and ``scale`` times as long."""

    def attack(global_weights: Tensor, uploads: list[Upload]) -> Upload:
        ends = torch.stack([upload.vectors["weights"] for upload in uploads])
        change = ends.mean(dim=0) - global_weights
        return Upload({"weights": global_weights - scale * change}, weight)

    return attack


@pytest.mark.parametrize("scale", [1e1, 1e3, 1e6, 1e9])
def test_one_attacker_moves_the_mean_at_will_and_a_robust_rule_within_bounds(scale: float) -> None:
    attack = turned(scale)
    honest = torch.stack(GOALS)
    # (9 m - scale m) / 10 for m = (1, 6.2/9)
    assert shared(MEAN, attack=attack) == pytest.approx(
        [(9 - scale) / 10, WHERE_MEAN * (9 - scale) / 10], rel=1e-6
    )
    for rule in (MEDIAN, AggregationOptions(rule="trimmed_mean", trim_fraction=0.1)):
        found = torch.tensor(shared(rule, attack=attack))
        assert torch.all((honest.amin(dim=0) <= found) & (found <= honest.amax(dim=0)))
    assert shared(MEDIAN, attack=attack) == pytest.approx([1.0, 0.05])  # of ten: (0 + 0.1) / 2
    # One of ten weights, a change of length 1 in place of any other.
    clipped = torch.tensor(shared(CLIPPED, attack=attack))
    without = 0.9 * torch.tensor(shared(CLIPPED))
    assert float((clipped - without).norm()) == pytest.approx(0.1, rel=1e-5)


def test_over_rounds_the_mean_runs_away_and_robust_rules_stay() -> None:
    """With s = 29 each round takes the mean from its goal m by (9 - 29)/10 - 1 = -3 times.

    w' = w + (9 (m - w) - 29 (m - w)) / 10 = w - 2 (m - w), so m - w' = 3 (m - w).
    """
    attack = turned(29.0)
    assert shared(MEAN, attack=attack, rounds=20)[0] == pytest.approx(1 - 3.0**20, rel=1e-5)
    for rule in (MEDIAN, TRIMMED):
        assert max(losses(shared(rule, attack=attack, rounds=20))[:7]) < 0.2
    # A tenth of the weights pulls one way, nine tenths the other, all with a length of at most C.
    assert max(losses(shared(CLIPPED, attack=attack, rounds=20))[:7]) < 0.5


def test_weights_that_clients_claim_are_believed_by_means_and_by_no_sorted_rule() -> None:
    attack = turned(29.0, weight=1e9)
    for rounds in (1, 10):  # C a round, where the attacker wants it
        at = torch.tensor(shared(CLIPPED, attack=attack, rounds=rounds))
        assert float(at.norm()) == pytest.approx(rounds, rel=1e-3)
        assert float(at[0]) < 0
    assert shared(MEDIAN, attack=attack) == shared(MEDIAN, attack=turned(29.0))


@pytest.mark.parametrize("n_liars", [4, 5, 6])
def test_half_of_the_uploads_is_more_than_the_median_bears(n_liars: int) -> None:
    setup = Setup(LAYOUT, 10, 0, options(), MEDIAN)
    method = METHODS["fedavg"](METHOD_OPTIONS["fedavg"].model_validate({"name": "fedavg"}), setup)
    ends = [torch.full((2,), 1e6)] * n_liars + GOALS[: 10 - n_liars]
    uploads = [Upload({"weights": end}, 1.0) for end in ends]
    found = method.aggregate(method.init_server(torch.zeros(2)), uploads, 1)
    assert (float(found.vectors["global_weights"].max()) > 1e5) == (n_liars >= 5)

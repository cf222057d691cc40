"""What cards say of privacy: numbers where a lever was set, and what they do not cover."""

from __future__ import annotations

from pfl_lm.export.card import client_card, global_card
from pfl_lm.privacy.spent import ClientSpent, Spent
from tests.export.card_facts import SCORES, client_facts, run_facts

RECORD = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "delta": 1e-5}
CLIENT = {"noise_multiplier": 2.0, "clip_norm": 0.3, "delta": 1e-3}
ROWS, CLIENTS = Spent(3.0808, 1e-5), Spent(4.2, 1e-3)
UNIFORM = {"name": "pflalign", "weighting": "uniform"}
NO_NOISE = "no noise was added"


def limits(card: str) -> str:
    return card.split("## Limits\n\n")[1].split("\n## ")[0]


def test_without_a_lever_nothing_is_claimed() -> None:
    for card in (client_card(run_facts(), client_facts()), global_card(run_facts(), {"a": SCORES})):
        assert "differential privacy" not in card
        assert NO_NOISE in limits(card)


def test_noise_on_rows() -> None:
    run = run_facts(privacy={"record_level": RECORD})
    card = limits(client_card(run, client_facts(spent=ClientSpent(ROWS))))
    assert (
        "- **One row among this client's train rows is bounded by differential privacy: ε = 3.09 "
        "at δ = 1e-05** (DP-SGD, noise multiplier 1, gradients of rows clipped to 0.5; Rényi "
        "accounting over all turns). Several rows about one thing are not one row. Validation and "
        "test rows, the scores above and the choice by them are not covered.\n"
    ) in card
    assert "Federated is not private" in card
    assert "as far as the next lines do not bound that." in card
    assert NO_NOISE not in card
    assert "nothing was encrypted against it. Uploads have the rows' noise in them.\n" in card

    shared = limits(global_card(run, {"alice": SCORES}, ClientSpent(ROWS)))
    assert "One row among a client's train rows" in shared
    assert "ε = 3.09 at δ = 1e-05**, the most of any client (DP-SGD" in shared


def test_noise_on_what_clients_share() -> None:
    run = run_facts(privacy={"client_level": CLIENT}, method=UNIFORM)
    card = limits(client_card(run, client_facts(spent=ClientSpent(None, CLIENTS))))
    assert (
        "- **This client's share in what others get, the shared adapter above all, is bounded by "
        "differential privacy: ε = 4.20 at δ = 0.001** (noise multiplier 2, changes clipped to "
        "0.3; Rényi accounting over all rounds). That does not cover this adapter, which is the "
        "client's own, nor its scores; and the server, which added the noise, saw its uploads "
        "without it.\n"
    ) in card
    shared = limits(global_card(run, {"alice": SCORES}, ClientSpent(None, CLIENTS)))
    assert (
        "- **A client's share in this adapter is bounded by differential privacy: ε = 4.20 at "
        "δ = 0.001**, the most of any client (noise multiplier 2, changes clipped to 0.3; Rényi "
        "accounting over all rounds). The server, which added the noise, saw every upload without "
        "it; scores are not covered.\n"
    ) in shared


def test_the_recipe_in_a_card_shows_the_lever() -> None:
    run = run_facts(privacy={"record_level": RECORD})
    card = client_card(run, client_facts(spent=ClientSpent(ROWS)))
    assert "privacy:\n  record_level:\n    noise_multiplier: 1.0\n" in card
    assert "noise_seed" not in card

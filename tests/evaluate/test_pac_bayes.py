"""The PAC-Bayes style figure: its parts by closed forms, and the whole by drawing worlds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from pfl_lm.data.batches import collate
from pfl_lm.evaluate.gibbs import noisy_token_error, token_error
from pfl_lm.evaluate.pac_bayes import (
    DELTA,
    DELTA_ROWS,
    DELTA_SAMPLES,
    SIGMAS,
    figure,
    fixed_model_figure,
    gaussian_kl,
    kl_of_coins,
    largest_risk,
    least_figure,
)
from pfl_lm.train.loss import IGNORED, error_by_row
from tests.world import World, make_world

K = len(SIGMAS)
shares = st.floats(0, 1)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


# --- the arithmetic ---------------------------------------------------------------------------


def test_the_divergence_of_coins_by_hand() -> None:
    assert kl_of_coins(0.5, 0.25) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_of_coins(0, 0.25) == pytest.approx(-math.log(0.75))
    assert kl_of_coins(1, 0.25) == pytest.approx(math.log(4))
    assert kl_of_coins(0.3, 0.3) == 0
    assert kl_of_coins(0.3, 0) == kl_of_coins(0.3, 1) == math.inf
    assert kl_of_coins(0, 0) == kl_of_coins(1, 1) == 0


@given(observed=shares, budget=st.floats(0, 5))
def test_the_largest_risk_is_where_the_budget_ends(observed: float, budget: float) -> None:
    found = largest_risk(observed, budget)
    assert observed <= found <= min(1.0, observed + math.sqrt(budget / 2) + 1e-7)  # Pinsker
    if found < 1:
        assert kl_of_coins(observed, found) >= budget * (1 - 1e-9)
    if found - 1e-6 > observed:
        assert kl_of_coins(observed, found - 1e-6) <= budget


def test_the_largest_risk_in_closed_form() -> None:
    for budget in (0.0, 0.01, 0.5, 3.0):  # no error seen: -ln(1 - p) = budget
        assert largest_risk(0.0, budget) == pytest.approx(1 - math.exp(-budget), abs=1e-12)
    assert largest_risk(1.0, 0.1) == 1
    assert largest_risk(0.2, math.inf) == 1
    for wrong in ((-0.1, 1.0), (1.1, 1.0), (0.5, -1.0), (math.nan, 1.0), (0.5, math.nan)):
        with pytest.raises(ValueError, match="expected an error in"):
            largest_risk(*wrong)


def test_the_divergence_of_gaussians_is_pytorchs() -> None:
    a, b = (torch.randn(7, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2))
    for sigma in SIGMAS:
        one, other = (Independent(Normal(x, sigma), 1) for x in (a, b))
        expected = float(kl_divergence(one, other))
        assert gaussian_kl(float((a - b).square().sum()), sigma) == pytest.approx(expected)
    assert gaussian_kl(0.0, 0.1) == 0


def test_the_figure_by_hand() -> None:
    # No error among 100 rows, R̂ known, no divergence: 1 - exp(-ln(2 · 10 · 5 / 0.04) / 100).
    assert least_figure(0.0, 100) == pytest.approx(1 - (20 * 5 / 0.04) ** -0.01)
    assert figure(0.0, math.inf, 3.0, 100) == pytest.approx(1 - (2500 * math.exp(3)) ** -0.01)
    # 50 noises without an error: R̂ is at most 1 - (5 / 0.01)^(-1/50) = 0.1169 first.
    of_samples = 1 - 500 ** (-1 / 50)
    found = figure(0.0, 50, 0.0, 100)
    assert kl_of_coins(of_samples, found) == pytest.approx(math.log(2500) / 100, rel=1e-6)
    assert fixed_model_figure(0.0, 100) == pytest.approx(1 - 0.05**0.01)
    assert pytest.approx(0.05) == DELTA == DELTA_ROWS + DELTA_SAMPLES
    assert list(SIGMAS) == sorted(set(SIGMAS))
    assert (K, DELTA_ROWS, DELTA_SAMPLES) == (5, 0.04, 0.01)  # what the sums above are made with


@given(error=shares, more=st.floats(0, 50), n=st.integers(2, 10**6), draws=st.integers(1, 10**6))
def test_the_figure_grows_with_what_it_should(
    error: float, more: float, n: int, draws: int
) -> None:
    found = figure(error, draws, 1.0, n)
    assert error <= found <= 1
    assert figure(error, draws, 1.0 + more, n) >= found
    assert figure(error, 2 * draws, 1.0, n) <= found + 1e-12
    assert figure(error, draws, 1.0, 16 * n) <= found + 1e-12
    assert figure(error, draws, 1.0, n, n_sigmas=2 * K) >= found
    assert least_figure(1.0, n) <= found + 1e-12


def test_the_constant_of_the_rows_is_large_enough() -> None:
    """E exp(n kl(mean ‖ p)) ≤ 2 √n for n coins, the lemma that the line of the rows stands on."""
    for n in (*range(1, 60), 200):
        for p in (0.001, 0.1, 0.37, 0.5, 0.9):
            terms = (
                math.comb(n, k) * (k / n) ** k * ((n - k) / n) ** (n - k)  # pᵏ(1-p)ⁿ⁻ᵏ cancels
                for k in range(n + 1)
            )
            assert 0 < p < 1
            assert math.fsum(terms) <= 2 * math.sqrt(n) + 1e-9


# --- worlds -----------------------------------------------------------------------------------


def phi(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize("sampled", [False, True])
def test_the_figure_holds_for_who_learns_noise_by_heart(sampled: bool) -> None:
    """Labels are coins, so that every model errs half of the time, however well it has learnt.

    Weights are fitted to the rows, and their length is the one with the least figure.
    """
    rng = np.random.default_rng(3)
    n, d, trials, sigma = 60, 200, 200, 1.0
    below, naive = 0, 0
    for _ in range(trials):
        x, y = rng.standard_normal((n, d)), rng.choice([-1.0, 1.0], n)
        direction = (y[:, None] * x).sum(axis=0) / n
        figures, errors = [], []
        for scale in (0.0, 0.3, 1.0, 3.0, 10.0):
            w = scale * direction
            margins = y * (x @ w) / (sigma * np.linalg.norm(x, axis=1))
            error, draws = float(phi(-margins).mean()), math.inf
            if sampled:
                noisy = w + sigma * rng.standard_normal((2, n, d))
                error = float((y * (noisy * x).sum(axis=2) < 0).mean())
                draws = 2 * n
            figures.append(figure(error, draws, gaussian_kl(float(w @ w), sigma), n))
            errors.append(error)
        below += min(figures) < 0.5
        naive += min(errors) < 0.5
    assert below <= DELTA * trials
    assert naive >= 0.95 * trials  # what was measured alone would have deceived


def test_the_figure_of_a_fixed_model_holds() -> None:
    rng, n, trials, p = np.random.default_rng(4), 30, 4000, 0.3
    errors = rng.binomial(n, p, trials) / n
    below = sum(fixed_model_figure(float(error), n) < p for error in errors)
    assert 0.005 * trials < below <= DELTA * trials  # it holds, and is not idle


# --- on a model -------------------------------------------------------------------------------


def test_a_rows_error_is_its_share_of_wrong_tokens(world: World) -> None:
    examples = world.examples(n_rows=4)
    world.adapter.write(world.vector(scale=0.2))
    batch = collate(examples, world.backbone.pad_token_id)
    logits = world.adapter.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    # Make the first guesses right in part: labels that are the guesses, every third one not.
    labels = batch["labels"].clone()
    expected = []
    for row in range(len(labels)):
        wrong, total = 0, 0
        for at in range(1, labels.shape[1]):
            if labels[row, at] == IGNORED:
                continue
            guess = int(logits[row, at - 1].argmax())
            labels[row, at] = guess if at % 3 else guess ^ 1
            wrong, total = wrong + (at % 3 == 0), total + 1
        expected.append(wrong / total)
    found = error_by_row(world.adapter.model, {**batch, "labels": labels})
    assert found.tolist() == pytest.approx(expected)
    assert 0 < min(expected) <= max(expected) < 1


def test_a_model_that_is_not_finite_is_wrong(world: World) -> None:
    batch = collate(world.examples(n_rows=4), world.backbone.pad_token_id)
    batch["labels"] = torch.where(batch["labels"] == IGNORED, IGNORED, 0)
    world.adapter.write(torch.full_like(world.start, math.nan))
    assert error_by_row(world.adapter.model, batch).tolist() == [1.0] * 4
    world.adapter.write(world.start)


def measured(world: World, sigma: float, *, seed: int = 1, samples: int = 3) -> float:
    return noisy_token_error(
        world.adapter,
        world.vector(),
        world.examples(n_rows=8),
        sigma=sigma,
        samples=samples,
        pad_token_id=world.backbone.pad_token_id,
        seed=seed,
    )


def test_every_row_meets_noises_of_its_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(
        "pfl_lm.evaluate.gibbs.error_by_row",
        lambda model, batch: drawn.append(world.adapter.read()) or torch.tensor([0.25]),
    )
    assert measured(world, 0.01) == 0.25
    once = torch.stack(drawn)
    assert len(once) == 24
    noise = (once - world.vector()) / 0.01
    assert len({tuple(row.tolist()) for row in noise}) == 24
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    between = torch.corrcoef(noise) - torch.eye(24)
    assert float(between.abs().max()) < 0.1
    drawn.clear()
    measured(world, 0.01)
    assert torch.equal(torch.stack(drawn), once)
    drawn.clear()
    measured(world, 0.01, seed=2)
    assert not torch.equal(torch.stack(drawn), once)


def test_without_noise_it_is_the_models_own_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parity(model: Any, batch: Any) -> torch.Tensor:  # a random model errs everywhere
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        last = batch["attention_mask"].sum(dim=1) - 1
        return (logits[torch.arange(len(last)), last].argmax(dim=-1) % 7) / 7

    monkeypatch.setattr("pfl_lm.evaluate.gibbs.error_by_row", parity)
    own = token_error(
        world.adapter,
        world.vector(),
        world.examples(n_rows=8),
        batch_size=3,
        pad_token_id=world.backbone.pad_token_id,
    )
    assert 0 < own < 1
    assert measured(world, 0.0) == pytest.approx(own)

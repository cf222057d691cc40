"""A PAC-Bayes style figure: how large a client's expected error can be, told by its train rows.

It is a diagnostic of one run and **not the bound of the pFLAlign paper**. Plain numbers only:

    prior       N(w_0, σ² I)      w_0: the untouched adapter of round 0, made from a seed alone
    posterior   N(w_i, σ² I)      w_i: the client's exported adapter
    KL          ‖w_i - w_0‖² / (2 σ²)
    rows        kl(R̂ ‖ R) ≤ (KL + ln(2 √n K / δ)) / n          but for a share δ of draws of n rows
    samples     kl(R̃ ‖ R̂) ≤ ln(K / δ') / N                    but for a share δ' of N noises

R is the error that the noisy adapter is expected to have on a new row, R̂ that on the n train rows,
R̃ what was measured of R̂ with noises that were drawn, and kl(q ‖ p) the divergence of two coins. The
figure is the largest R that both lines allow. K is how many σ there were to choose from.

Sources: A. Maurer, "A Note on the PAC Bayesian Theorem", arXiv cs/0411099 (the line of the rows,
for losses in [0, 1]); J. Langford and R. Caruana, "(Not) Bounding the True Error", NIPS 2001 (the
line of the samples, and Gaussians about trained weights); G. K. Dziugaite and D. M. Roy, "Computing
Nonvacuous Generalization Bounds for Deep (Stochastic) Neural Networks", arXiv 1703.11008.
"""

from __future__ import annotations

import math

SIGMAS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""The σ to choose from. They are fixed here, before any data."""

DELTA_ROWS, DELTA_SAMPLES = 0.04, 0.01
DELTA = DELTA_ROWS + DELTA_SAMPLES
"""The chance that a client's figure is wrong, if what it assumes is right."""

VACUOUS = 0.999
"""A figure from here on says nothing: no error is above 1."""


def kl_of_coins(q: float, p: float) -> float:
    """Return kl(q ‖ p) = q ln(q/p) + (1-q) ln((1-q)/(1-p)), in nats; both in [0, 1]."""
    heads = 0.0 if q == 0 else math.inf if p == 0 else q * math.log(q / p)
    tails = 0.0 if q == 1 else math.inf if p == 1 else (1 - q) * math.log((1 - q) / (1 - p))
    return max(0.0, heads + tails)


def largest_risk(observed: float, budget: float) -> float:
    """Return the largest p with kl(observed ‖ p) ≤ budget, by bisection, rounded up.

    Raises:
        ValueError: ``observed`` is not in [0, 1], or the budget is below 0.
    """
    if not 0 <= observed <= 1 or not budget >= 0:
        raise ValueError(f"expected an error in [0, 1] and a budget ≥ 0: {observed}, {budget}")
    low, high = observed, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if kl_of_coins(observed, middle) <= budget:
            low = middle
        else:
            high = middle
    return high


def gaussian_kl(squared_distance: float, sigma: float) -> float:
    """Return KL(N(a, σ² I) ‖ N(b, σ² I)) in nats, for ‖a - b‖² = ``squared_distance``."""
    return squared_distance / (2 * sigma**2)


def figure(
    error: float, n_draws: float, divergence: float, n_rows: int, *, n_sigmas: int = len(SIGMAS)
) -> float:
    """Return the PAC-Bayes style figure for a measured error R̃ in [0, 1].

    Args:
        error: R̃, the mean over rows and noises.
        n_draws: N, how many independent noises it is a mean over, in equal shares. Infinity if R̂
            itself is known.
        divergence: KL, in nats.
        n_rows: n.
        n_sigmas: K.
    """
    of_samples = math.log(n_sigmas / DELTA_SAMPLES) / n_draws
    of_rows = (divergence + math.log(2 * math.sqrt(n_rows) * n_sigmas / DELTA_ROWS)) / n_rows
    return largest_risk(largest_risk(error, of_samples), of_rows)


def least_figure(divergence: float, n_rows: int, *, n_sigmas: int = len(SIGMAS)) -> float:
    """Return what the figure would be without a single error: no error can make it smaller."""
    return figure(0.0, math.inf, divergence, n_rows, n_sigmas=n_sigmas)


def fixed_model_figure(error: float, n_rows: int) -> float:
    """Return the same for one model that saw no data: kl(R̂ ‖ R) ≤ ln(1/δ) / n (Chernoff)."""
    return largest_risk(error, math.log(1 / DELTA) / n_rows)

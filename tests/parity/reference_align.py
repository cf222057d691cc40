"""Algorithm 1 of pFLAlign (arXiv 2605.02143) in float64 numpy, one formula a line.

Written from the paper's algorithm, never from `pfl_lm.align`: P by the recursion with
alpha, not as a ratio of two means. At eps = 0 the conventions are 0/0 = 0 for the two quotients
by v, z = 0 where m = 0, and z = infinity where only the variance is 0.
"""

from __future__ import annotations

import math

import numpy as np

erf = np.vectorize(math.erf, otypes=[np.float64])


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b with 0/0 = 0."""
    return np.divide(a, b, out=np.where(a == 0, 0.0, np.inf), where=b != 0)


class ReferenceState:
    """m, v and P of one client, all zero at first."""

    def __init__(self, d: int) -> None:
        self.m, self.v, self.P = np.zeros(d), np.zeros(d), np.zeros(d)

    def start_round(self) -> None:
        self.m = np.zeros_like(self.m)

    def step(self, g, delta, beta: float = 0.9, eps: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """(P, gamma) of one optimizer step."""
        g, delta = np.asarray(g, dtype=np.float64), np.asarray(delta, dtype=np.float64)
        self.m = beta * self.m + (1 - beta) * g
        self.v = beta * self.v + (1 - beta) * g**2
        alpha = 1 - ratio((1 - beta) * g**2, self.v + eps)
        self.P = alpha * self.P + ratio((1 - beta) * self.m**2, self.v + eps)
        variance = np.maximum(self.v - self.m**2, 0)
        z = ratio(np.abs(self.m), np.sqrt(2 * variance + eps))
        gamma = 0.5 - 0.5 * erf(z) * np.sign(-self.m * delta)
        return self.P, gamma


def quadratic_local_update(
    state: ReferenceState,
    w_g: np.ndarray,
    delta: np.ndarray,
    *,
    h: np.ndarray,
    c: np.ndarray,
    noise: np.ndarray,
    eta: float,
    beta: float = 0.9,
    eps: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(w, new delta) after one local update on F(w) = h/2 (w - c)^2, coordinate by coordinate.

    `noise` has shape (T, d) and is added to the gradient of each of the T steps.
    """
    state.start_round()
    w, steps = w_g + delta, len(noise)
    for t in range(steps):
        g = h * (w - c) + noise[t]
        P, gamma = state.step(g, delta, beta, eps)
        w = w - eta * P * g - gamma * delta / steps
    return w, w - w_g

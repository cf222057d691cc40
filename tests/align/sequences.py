"""Sequences of gradients for the tests of this folder, and the bound on what rounding does.

How far two evaluations may differ (`u` is the unit roundoff, `t` the steps since v and P were 0):

* m, v and P are weighted means, so every one of them is known to about 3t roundings of the same
  mean of absolute values. Where gradients change sign m cancels, hence the yardstick for P is not
  P but `P_abs`, the P of the gradients |g|: |error of P| <= 10 t u P_abs.
* The variance v - m^2 cancels: its error is that of v, about 9 t u v, however small it is itself.
  gamma does not mind. With x = m / sigma, v = sigma^2 (1 + x^2), and gamma = Phi(x) moves by
  phi(x) (1 + x^2) x / 2 <= 0.31 of (error of the variance) / v, and by phi(x) sqrt(1 + x^2) <= 0.4
  of (error of m) / sqrt(v). Where the variance is lost altogether, z is large and gamma is 0 or 1
  either way. So gamma is compared absolutely, |error of gamma| <= 10 t u; z or sigma could not be.

The reference's own alpha = 1 - ... cancels too and adds a few u of float64.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st

from pfl_lm.align import AlignmentState, alignment_step

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
BETAS = (0.5, 0.9, 0.99)


def tolerance(dtype: torch.dtype, steps: int) -> float:
    """The bound of the module docstring, relative to P_abs for P and absolute for gamma."""
    return 10 * steps * UNIT_ROUNDOFF[dtype] + 8 * UNIT_ROUNDOFF[torch.float64]


def supremum(beta: float) -> float:
    """The largest P there can be: the squared l1 norm of (1-beta) beta^(n/2), n >= 0."""
    return (1 + math.sqrt(beta)) ** 2


def run(grads, offset, *, dtype=torch.float64, rounds=(0,), **options):
    """Feed the rows of `grads`, shape (steps, d), starting a round at the given rows."""
    grads = torch.as_tensor(np.asarray(grads), dtype=dtype)
    offset = torch.as_tensor(np.asarray(offset), dtype=dtype)
    state = AlignmentState.zeros(grads.shape[1], dtype=dtype)
    preconditioners, gammas = [], []
    for t, grad in enumerate(grads):
        if t in rounds:
            state.start_round()
        step = alignment_step(state, grad, offset, **options)
        preconditioners.append(step.preconditioner.clone())
        gammas.append(step.gamma.clone())
    return state, torch.stack(preconditioners), torch.stack(gammas)


def gradient_zoo(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradients (steps, d) and an offset (d,): every regime at every scale with every offset."""
    rng = np.random.default_rng(20260502)
    columns = [snr + rng.standard_normal(steps) for snr in (0.0, 0.3, 1.0, 3.0, -0.3, -1.0, -3.0)]
    columns += [np.ones(steps), -np.ones(steps)]
    columns.append((-1.0) ** np.arange(steps))
    columns.append(np.where(np.arange(steps) < steps // 2, 1.0, -1.0))
    columns.append(np.where(np.arange(steps) % 3 == 1, rng.standard_normal(steps), 0.0))
    columns.append(np.where(np.arange(steps) < 5, 0.0, 1.0))
    columns.append(np.where(np.arange(steps) < 5, 1.0, 0.0))
    columns.append(10.0 ** np.where(np.arange(steps) % 7 == 3, 2.0, -2.0))
    columns.append(np.zeros(steps))
    scales = (1e-8, 1e-6, 1e-3, 1.0, 1e6)
    offsets = (0.02, -0.3, 0.0)
    grads = np.stack([s * x for x in columns for s in scales for _ in offsets], axis=1)
    return grads, np.tile(offsets, len(columns) * len(scales))


# Multiples of 2^-10 over six decades, zeros and both signs: no square underflows in fp32.
gradient_numbers = st.builds(
    lambda n, k: n / 1024 * 10.0**k, st.integers(-2048, 2048), st.integers(-3, 3)
)
gradient_sequences = st.lists(
    st.lists(gradient_numbers, min_size=3, max_size=3), min_size=1, max_size=12
).map(np.array)
offsets_of_three = st.lists(
    st.sampled_from([-1e3, -0.1, -1e-6, 0.0, 1e-6, 0.1, 1e3]), min_size=3, max_size=3
).map(np.array)

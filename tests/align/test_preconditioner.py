"""(d) P is a ratio of two running means: of squared m and of squared gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.align.sequences import (
    BETAS,
    gradient_sequences,
    offsets_of_three,
    run,
    supremum,
    tolerance,
)


@pytest.mark.parametrize("beta", BETAS)
def test_preconditioner_is_mean_of_squared_m_over_mean_of_squared_g(beta):
    rng = np.random.default_rng(1)
    grads = rng.standard_normal((45, 64)) + rng.uniform(-2, 2, 64)
    rounds = (0, 15, 30)
    _, P, _ = run(grads, np.ones(64), beta=beta, rounds=rounds)
    m = s = v = np.zeros(64)
    for t, g in enumerate(grads):
        m = beta * (0 if t in rounds else m) + (1 - beta) * g
        s = beta * s + (1 - beta) * m**2
        v = beta * v + (1 - beta) * g**2
        np.testing.assert_allclose(P[t], s / v, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
def test_constant_gradient_opens_the_gate(beta, dtype):
    """P -> 1. After 40 time constants what is missing, about 2 t beta^t, is below rounding."""
    grad = np.array([3.0, -2e-4, 5e3, 1e-7])
    _, P, _ = run(np.tile(grad, (int(40 / (1 - beta)), 1)), np.ones(4), beta=beta, dtype=dtype)
    rtol = {torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(P[-1], torch.ones(4, dtype=dtype), rtol=rtol, atol=0)
    assert P[0].tolist() == pytest.approx([(1 - beta) ** 2] * 4, rel=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_pure_noise_nearly_closes_the_gate(beta):
    """Weighted by v, P averages E[m^2] / E[g^2] = (1-beta)/(1+beta), 0.053 at beta = 0.9."""
    steps = int(8 / (1 - beta))
    grads = np.random.default_rng(2).standard_normal((steps, 2048))
    state, P, _ = run(grads, np.ones(2048), beta=beta)
    mean = (P[-1] * state.second_moment).sum() / state.second_moment.sum()
    assert mean.item() == pytest.approx((1 - beta) / (1 + beta), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shrinking_gradients_overshoot_up_to_the_supremum(dtype):
    """P passes 2.6 within 50 steps of decay; under g_t = beta^(t/2) it tends to the supremum."""
    after_an_open_gate = np.concatenate([np.ones(100), 0.92 ** np.arange(1, 51)])
    _, P, _ = run(after_an_open_gate[:, None], [1.0], dtype=dtype)
    assert P.max() > 2.6
    _, P, _ = run(0.9 ** (np.arange(400)[:, None] / 2), [1.0], dtype=dtype)
    assert P[-1] > 0.9 * supremum(0.9)
    assert P.max() < supremum(0.9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    grads=gradient_sequences,
    offset=offsets_of_three,
    restarts=st.sets(st.integers(0, 11)),
    beta=st.sampled_from(BETAS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_preconditioner_and_gamma_stay_in_range(grads, offset, restarts, beta, dtype):
    _, P, gamma = run(grads, offset, dtype=dtype, rounds=restarts, beta=beta)
    assert torch.all((P >= 0) & (supremum(beta) * (1 + tolerance(dtype, len(grads))) >= P))
    assert torch.all((gamma >= 0) & (gamma <= 1))

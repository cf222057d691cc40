"""m, v, P and gamma of one client against Algorithm 1 and by hand."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.align.sequences import (
    BETAS,
    gradient_sequences,
    gradient_zoo,
    offsets_of_three,
    run,
    tolerance,
)
from tests.parity.reference_align import ReferenceState


def run_reference(grads, offset, *, rounds=(0,), beta=0.9, eps=0.0):
    state = ReferenceState(grads.shape[1])
    preconditioners, gammas = [], []
    for t, grad in enumerate(grads):
        if t in rounds:
            state.start_round()
        preconditioner, gamma = state.step(grad, offset, beta, eps)
        preconditioners.append(preconditioner)
        gammas.append(gamma)
    return state, np.stack(preconditioners), np.stack(gammas)


def assert_agrees_with_reference(grads, offset, *, dtype, rounds, beta, eps):
    grads, offset = np.float32(grads).astype(np.float64), np.float32(offset).astype(np.float64)
    state, P, gamma = run(grads, offset, dtype=dtype, rounds=rounds, beta=beta, eps=eps)
    wanted, wanted_P, wanted_gamma = run_reference(grads, offset, rounds=rounds, beta=beta, eps=eps)
    wanted_abs, P_abs, _ = run_reference(np.abs(grads), offset, rounds=rounds, beta=beta, eps=eps)

    tol = np.array([tolerance(dtype, t + 1) for t in range(len(grads))])[:, None]
    assert P.dtype == gamma.dtype == dtype
    assert np.all(np.abs(P.double().numpy() - wanted_P) <= tol * (P_abs + 1e-300))
    assert np.all(np.abs(gamma.double().numpy() - wanted_gamma) <= tol)
    m_error = np.abs(state.first_moment.double().numpy() - wanted.m)
    v_error = np.abs(state.second_moment.double().numpy() - wanted.v)
    assert np.all(m_error <= tol[-1] * wanted_abs.m)
    assert np.all(v_error <= tol[-1] * wanted.v)
    assert torch.equal(state.preconditioner, P[-1])


# --- against the independent recursion --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-12])
@pytest.mark.parametrize("beta", BETAS)
def test_equals_algorithm_1_in_every_regime(beta, eps, dtype):
    grads, offset = gradient_zoo(60)
    assert_agrees_with_reference(
        grads, offset, dtype=dtype, rounds=(0, 20, 23, 40), beta=beta, eps=eps
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    grads=gradient_sequences,
    offset=offsets_of_three,
    restarts=st.sets(st.integers(0, 11)),
    beta=st.floats(0.05, 0.995),
    eps=st.sampled_from([0.0, 1e-12, 1e-3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_algorithm_1_on_any_sequence(grads, offset, restarts, beta, eps, dtype):
    assert_agrees_with_reference(grads, offset, dtype=dtype, rounds=restarts, beta=beta, eps=eps)


def test_beta_and_eps_default_to_the_design():
    grads, offset = gradient_zoo(5)
    _, P, gamma = run(grads, offset)
    _, P_stated, gamma_stated = run(grads, offset, beta=0.9, eps=0.0, correction="erf")
    assert torch.equal(P, P_stated)
    assert torch.equal(gamma, gamma_stated)


# --- (a) by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_first_step_by_hand(scale, dtype):
    """m = 0.1 g, v = 0.1 g^2, so P = 0.1 m^2/v = 0.01 and m/sigma = 0.1/sqrt(0.1 - 0.01) = 1/3.

    A gradient along the offset means that descent opposes it: gamma = Phi(1/3) = 0.6305587.
    """
    state, P, gamma = run(scale * np.array([[2.0, -2.0, 2.0, -2.0]]), [1, -1, -1, 1], dtype=dtype)
    opposing, agreeing = 0.6305586598182364, 0.3694413401817636
    rtol = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    expected = torch.tensor([opposing, opposing, agreeing, agreeing], dtype=dtype)
    torch.testing.assert_close(P[0], torch.full((4,), 0.01, dtype=dtype), rtol=rtol, atol=0)
    torch.testing.assert_close(gamma[0], expected, rtol=rtol, atol=0)
    torch.testing.assert_close(
        state.second_moment, torch.full((4,), 0.4 * scale**2, dtype=dtype), rtol=rtol, atol=0
    )


def test_second_step_by_hand():
    """g = 1, 0 at beta = 1/2: v = 1/2, 1/4; m = 1/2, 1/4; s = 1/8, 3/32; so P = 1/4, 3/8.

    At step 2 sigma^2 = 1/4 - 1/16 = 3/16, so m/sigma = 1/sqrt(3).
    """
    _, P, gamma = run([[1.0], [0.0]], [0.7], beta=0.5)
    assert P[:, 0].tolist() == [0.25, 0.375]
    expected = [NormalDist().cdf(1.0), NormalDist().cdf(1 / math.sqrt(3))]
    np.testing.assert_allclose(gamma[:, 0], expected, rtol=1e-14)


def test_eps_enters_as_published():
    """g = 1 at beta = 1/2, eps = 1/2: v + eps = 1, P = 1/8; 2 sigma^2 + eps = 1, z = 1/2."""
    _, P, gamma = run([[1.0]], [0.7], beta=0.5, eps=0.5)
    assert P.item() == 0.125
    assert gamma.item() == pytest.approx(0.5 + 0.5 * math.erf(0.5), rel=1e-14)


def test_published_eps_freezes_small_gradients_and_zero_does_not():
    grads = np.full((1, 1), 1e-8)
    _, frozen, _ = run(grads, [1.0], eps=1e-12)
    _, free, _ = run(grads, [1.0], eps=0.0)
    assert frozen.item() == pytest.approx(0.1 * 1e-18 / (1e-17 + 1e-12), rel=1e-12)
    assert free.item() == pytest.approx(0.01, rel=1e-12)

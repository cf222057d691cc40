"""Zeros, lost variances, and the scale of the loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pfl_lm.align import AlignmentState, alignment_step
from tests.align.sequences import (
    run,
    supremum,
    tolerance,
)

# --- (i) zeros and lost variances -------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gradients_say_nothing(dtype, eps):
    """What lora_A sees while lora_B is 0: P = 0, gamma = 1/2, and no NaN."""
    state, P, gamma = run(np.zeros((5, 3)), [1.0, -1.0, 0.0], dtype=dtype, eps=eps)
    assert torch.equal(P, torch.zeros_like(P))
    assert torch.equal(gamma, torch.full_like(gamma, 0.5))
    for moment in (state.first_moment, state.second_moment, state.preconditioner):
        assert torch.equal(moment, torch.zeros_like(moment))


def test_zero_gradients_of_either_sign_bit():
    _, P, gamma = run([[0.0, -0.0], [-0.0, -0.0]], [1.0, -1.0])
    assert torch.equal(P, torch.zeros_like(P))
    assert torch.equal(gamma, torch.full_like(gamma, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_round_of_zeros_after_a_round_of_gradients(dtype):
    """v = beta v_prev and m = 0 leave P where it was, and gamma at one half."""
    grads = np.concatenate([np.random.default_rng(4).standard_normal((10, 6)), np.zeros((10, 6))])
    _, P, gamma = run(grads, np.ones(6), dtype=dtype, rounds=(0, 10))
    torch.testing.assert_close(P[-1], P[9], rtol=tolerance(dtype, 20), atol=0)
    assert torch.equal(gamma[10:], torch.full_like(gamma[10:], 0.5))


def test_gradients_that_vanish_for_good_leave_finite_numbers():
    """1100 steps take v from 1 below the smallest fp32 number."""
    grads = np.zeros((1100, 3))
    grads[0] = [1.0, -1.0, 1e-8]
    _, P, gamma = run(grads, [1.0, 1.0, -1.0], dtype=torch.float32)
    assert torch.isfinite(P).all()
    assert torch.all((P >= 0) & (supremum(0.9) >= P))
    assert torch.all((gamma >= 0) & (gamma <= 1))


def test_variance_that_rounds_below_zero_counts_as_zero():
    """Under constant gradients v - m^2 = beta^t g^2 falls below rounding, of either sign."""
    grad = np.random.default_rng(5).uniform(0.1, 9.0, 300)
    state, P, gamma = run(np.tile(grad, (250, 1)), np.ones(300), dtype=torch.float32)
    variance = state.second_moment - state.first_moment**2
    assert (variance < 0).any()  # otherwise this test shows nothing
    assert torch.isfinite(P).all()
    assert torch.equal(gamma[-1], torch.ones(300))


def test_only_the_variance_zero_means_certainty():
    """m = v = 1 stay 1 under g = 1 at beta = 1/2: z is infinite; with eps = 1 it is 1."""

    def certain_state():
        state = AlignmentState.zeros(3, dtype=torch.float64)
        state.first_moment.fill_(1.0)
        state.second_moment.fill_(1.0)
        return state

    grad = torch.ones(3, dtype=torch.float64)
    offset = torch.tensor([0.3, -0.3, 0.0], dtype=torch.float64)
    step = alignment_step(certain_state(), grad, offset, beta=0.5)
    assert step.gamma.tolist() == [1.0, 0.0, 0.5]
    step = alignment_step(certain_state(), grad, offset, beta=0.5, eps=1.0)
    expected = [0.5 + 0.5 * math.erf(1.0), 0.5 - 0.5 * math.erf(1.0), 0.5]
    assert step.gamma.tolist() == pytest.approx(expected, rel=1e-14)


# --- (j) the scale of the loss ----------------------------------------------------------------


@pytest.mark.parametrize("correction", ["erf", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-24, -1, 7, 20])
def test_power_of_two_loss_scale_changes_no_bit(exponent, dtype, correction):
    rng = np.random.default_rng(6)
    grads, offset = rng.standard_normal((30, 50)) + 0.3, rng.standard_normal(50)
    grads[:, 0] = 0.0
    kwargs = {"dtype": dtype, "rounds": (0, 12), "correction": correction}
    _, P, gamma = run(grads, offset, **kwargs)
    _, P_scaled, gamma_scaled = run(2.0**exponent * grads, offset, **kwargs)
    assert torch.equal(P, P_scaled)
    assert torch.equal(gamma, gamma_scaled)


@pytest.mark.parametrize("scale", [1e-7, 3.7, 1e6])
def test_any_loss_scale_changes_nothing_but_rounding(scale):
    rng = np.random.default_rng(7)
    grads, offset = rng.standard_normal((30, 50)) + 0.3, rng.standard_normal(50)
    _, P, gamma = run(grads, offset)
    _, P_scaled, gamma_scaled = run(scale * grads, offset)
    tol = tolerance(torch.float64, 30)
    torch.testing.assert_close(P_scaled, P, rtol=0, atol=tol * supremum(0.9))
    torch.testing.assert_close(gamma_scaled, gamma, rtol=0, atol=tol)

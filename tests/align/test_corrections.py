"""gamma is a probability, and what the other corrections put in its place."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfl_lm.align import AlignmentState, alignment_step
from tests.align.sequences import (
    gradient_sequences,
    gradient_zoo,
    offsets_of_three,
    run,
)

# --- (e) gamma is a probability ---------------------------------------------------------------


def test_gamma_is_the_probability_that_the_gradient_points_along_the_offset():
    """gamma = Pr[g * offset > 0] for g ~ N(m, v - m^2), drawn 200 000 times; 5 standard errors."""
    rng = np.random.default_rng(3)
    means = np.array([0.0, 0.1, 0.5, 1.0, 2.0, 4.0, -0.2, -1.0, -3.0, 0.7])
    offset = np.array([0.5, -0.1, 2.0, 0.01, -1.0, -0.3, 1.0, -0.4, 0.2, -7.0])
    state, _, gamma = run(means + rng.standard_normal((12, 10)), offset)
    m = state.first_moment.numpy()
    sigma = np.sqrt(state.second_moment.numpy() - m**2)
    n = 200_000
    frequency = np.mean((m + sigma * rng.standard_normal((n, 10))) * offset > 0, axis=0)
    assert np.all(np.abs(frequency - gamma[-1].numpy()) < 5 * 0.5 / math.sqrt(n))
    assert gamma[-1].min() < 0.2  # the draws cover agreement, indifference and opposition
    assert gamma[-1].max() > 0.8
    exact = [NormalDist().cdf(np.sign(d) * x) for d, x in zip(offset, m / sigma, strict=True)]
    np.testing.assert_allclose(gamma[-1], exact, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_descent_keeps_an_agreeing_offset_and_removes_an_opposed_one(dtype):
    grads = np.tile([1.0, 1.0, -1.0, -1.0, 1.0], (60, 1))
    _, _, gamma = run(grads, [0.1, -0.1, 0.1, -0.1, 0.0], dtype=dtype)
    assert gamma[-1].tolist() == [1.0, 0.0, 0.0, 1.0, 0.5]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grads=gradient_sequences, offset=offsets_of_three, eps=st.sampled_from([0.0, 1e-12]))
def test_gamma_depends_on_the_offset_by_sign_alone(grads, offset, eps):
    _, P, gamma = run(grads, offset, eps=eps)
    _, P_mirrored, gamma_mirrored = run(-grads, -offset, eps=eps)
    _, P_flipped, gamma_flipped = run(grads, -offset, eps=eps)
    _, _, gamma_unit = run(grads, np.sign(offset), eps=eps)
    assert torch.equal(P, P_mirrored)
    assert torch.equal(P, P_flipped)
    assert torch.equal(gamma, gamma_mirrored)
    assert torch.equal(gamma, gamma_unit)
    torch.testing.assert_close(gamma_flipped, 1 - gamma, rtol=0, atol=1e-15)


# --- the other corrections --------------------------------------------------------------------


@pytest.mark.parametrize(("correction", "value"), [("none", 0.0), ("half", 0.5), ("full", 1.0)])
def test_constant_corrections(correction, value):
    """They hold at zero offsets and zero gradients too."""
    grads, offset = gradient_zoo(4)
    _, _, gamma = run(grads, offset, correction=correction, dtype=torch.float32)
    assert torch.equal(gamma, torch.full_like(gamma, value))


def test_hard_correction_is_the_sign_alone():
    grads = [[1e-6, 1e-6, -1e-6, -5.0, 1.0, 0.0]]
    _, _, gamma = run(grads, [2.0, -2.0, 2.0, -1e-6, 0.0, 1.0], correction="hard")
    assert gamma[0].tolist() == [1.0, 0.0, 0.0, 1.0, 0.5, 0.5]


def test_hard_correction_follows_m_and_not_the_last_gradient():
    _, _, gamma = run([[1.0, -1.0], [-0.1, 0.1]], [1.0, 1.0], correction="hard")
    assert gamma[1].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("correction", ["none", "half", "full", "hard"])
def test_correction_changes_gamma_and_nothing_else(correction):
    grads, offset = gradient_zoo(12)
    state, P, _ = run(grads, offset, rounds=(0, 6))
    other, other_P, _ = run(grads, offset, rounds=(0, 6), correction=correction)
    assert torch.equal(P, other_P)
    for name in ("first_moment", "second_moment", "preconditioner"):
        assert torch.equal(getattr(state, name), getattr(other, name))


@pytest.mark.parametrize(("correction", "value"), [("erf", 0.6305587), ("hard", 1.0)])
def test_tiny_offset_is_not_zero(correction, value):
    """m times the offset is 1e-46, which fp32 rounds to 0."""
    _, _, gamma = run([[1e-9]], [1e-36], correction=correction, dtype=torch.float32)
    assert gamma.item() == pytest.approx(value, rel=1e-6)


def test_zero_offset_is_indifferent():
    """sign(0) = 0: gamma = 1/2 however clear the gradient; there is nothing to remove."""
    grads = np.tile([1.0, -1.0, 1e-7, 0.0], (40, 1))
    for correction in ("erf", "hard"):
        _, _, gamma = run(grads, np.zeros(4), correction=correction)
        assert torch.equal(gamma, torch.full_like(gamma, 0.5))


def test_unknown_correction_is_refused_by_name():
    state = AlignmentState.zeros(3)
    with pytest.raises(ValueError, match=r"soft.*erf.*none.*half.*full.*hard"):
        alignment_step(state, torch.ones(3), torch.ones(3), correction="soft")
    assert state.second_moment.sum() == 0  # nothing advanced

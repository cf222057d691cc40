"""m, v, P and gamma of one client against Algorithm 1 and against what its formulas mean.

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
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfl_lm.align import AlignmentState, alignment_step
from tests.parity.reference_align import ReferenceState

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


# --- against the independent recursion --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-12])
@pytest.mark.parametrize("beta", BETAS)
def test_equals_algorithm_1_in_every_regime(beta, eps, dtype):
    grads, offset = gradient_zoo(60)
    assert_agrees_with_reference(
        grads, offset, dtype=dtype, rounds=(0, 20, 23, 40), beta=beta, eps=eps
    )


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


# --- (d) P is a ratio of two running means ----------------------------------------------------


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


# --- the state and the arguments --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_starts_at_zero(dtype):
    state = AlignmentState.zeros(5, dtype=dtype)
    for name in ("first_moment", "second_moment", "preconditioner"):
        assert torch.equal(getattr(state, name), torch.zeros(5, dtype=dtype))
    default = AlignmentState.zeros(5)
    assert default.first_moment.dtype == torch.float32
    assert default.first_moment.device.type == "cpu"
    default.first_moment.fill_(1.0)  # three tensors, not one
    assert default.second_moment.sum() == default.preconditioner.sum() == 0


def test_state_is_updated_in_place():
    state = AlignmentState.zeros(4)
    before = (state.first_moment, state.second_moment, state.preconditioner)
    addresses = [tensor.data_ptr() for tensor in before]
    for _ in range(2):
        state.start_round()
        step = alignment_step(state, torch.tensor([1.0, -2.0, 0.0, 4.0]), torch.ones(4))
    after = (state.first_moment, state.second_moment, state.preconditioner)
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert [tensor.data_ptr() for tensor in after] == addresses
    assert state.first_moment.count_nonzero() == 3
    assert torch.equal(step.preconditioner, state.preconditioner)
    assert step.preconditioner.shape == step.gamma.shape == (4,)


def test_start_round_forgets_m_and_keeps_v_and_the_preconditioner():
    state, _, _ = run(np.ones((4, 3)), np.ones(3), dtype=torch.float32)
    v, P = state.second_moment.clone(), state.preconditioner.clone()
    state.start_round()
    assert torch.equal(state.first_moment, torch.zeros(3))
    assert torch.equal(state.second_moment, v)
    assert torch.equal(state.preconditioner, P)


@pytest.mark.parametrize("correction", ["erf", "none", "half", "full", "hard"])
def test_arguments_are_left_alone(correction):
    state = AlignmentState.zeros(3)
    grad, offset = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 0.5, -0.5])
    kept_grad, kept_offset = grad.clone(), offset.clone()
    for _ in range(3):
        step = alignment_step(state, grad, offset, correction=correction)
    assert torch.equal(grad, kept_grad)
    assert torch.equal(offset, kept_offset)
    storages = {x.untyped_storage().data_ptr() for x in (grad, offset)}
    kept = (state.first_moment, state.second_moment, step.preconditioner, step.gamma)
    assert not storages & {x.untyped_storage().data_ptr() for x in kept}


@pytest.mark.parametrize("wrong", [(2,), (4,), (1,), (), (3, 1), (1, 3)])
def test_shapes_that_would_broadcast_or_fail_are_refused(wrong):
    for grad, offset in ((torch.ones(wrong), torch.ones(3)), (torch.ones(3), torch.ones(wrong))):
        state = AlignmentState.zeros(3)
        with pytest.raises(ValueError):
            alignment_step(state, grad, offset)
        assert state.second_moment.sum() == 0  # nothing advanced


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_narrow_gradient_is_widened_to_the_state(narrow):
    grad = torch.tensor([1.0, -0.5, 0.25])  # exact in every dtype
    wide, widened = AlignmentState.zeros(3), AlignmentState.zeros(3)
    alignment_step(wide, grad, torch.ones(3))
    alignment_step(widened, grad.to(narrow), torch.ones(3))
    assert torch.equal(wide.preconditioner, widened.preconditioner)
    assert widened.second_moment.dtype == torch.float32

"""The offset over a round: added at the start, given back in shares, formed anew at the end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pfl_lm.align import (
    AlignmentState,
    alignment_step,
    correction_share,
    decayed_offset,
    offset_after_round,
    realigned_start,
)
from tests.parity.reference_align import ReferenceState, quadratic_local_update


def random_vectors(*shapes, scale=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in shapes]


# --- the three functions by themselves --------------------------------------------------------


def test_realigned_start_adds_the_offset_into_a_new_vector():
    global_weights = torch.tensor([1.0, -2.0, 0.5])
    for offset in (torch.tensor([0.25, 0.5, -0.5]), torch.zeros(3)):
        start = realigned_start(global_weights, offset)
        assert torch.equal(start, global_weights + offset)
        start.fill_(9.0)  # training writes into it
        assert global_weights.tolist() == [1.0, -2.0, 0.5]
        assert 9.0 not in offset


def test_offset_is_what_the_round_added_to_what_it_started_from():
    weights, global_weights = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 0.5])
    offset = offset_after_round(weights, global_weights)
    assert offset.tolist() == [0.5, -3.0, 0.0]
    offset.fill_(9.0)
    assert weights.tolist() == [1.0, -2.0, 0.5]
    assert global_weights.tolist() == [0.5, 1.0, 0.5]


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_offset_is_formed_in_fp32(narrow):
    """1 - 2^-12 has more digits than either narrow dtype: subtracting there gives 1."""
    weights = torch.tensor([1.0, -1.0], dtype=narrow)
    global_weights = torch.tensor([2.0**-12, 2.0**-12], dtype=narrow)
    offset = offset_after_round(weights, global_weights)
    assert offset.dtype == torch.float32
    assert offset.tolist() == [1 - 2.0**-12, -1 - 2.0**-12]


def test_offset_survives_as_a_difference_of_unequal_dtypes():
    weights, global_weights = torch.tensor([1.0 + 2.0**-20]), torch.tensor([1.0]).bfloat16()
    assert offset_after_round(weights, global_weights).tolist() == [2.0**-20]


def test_correction_share_by_hand():
    gamma, offset = torch.tensor([0.0, 0.5, 1.0, 1.0]), torch.tensor([8.0, 8.0, -8.0, 0.0])
    assert correction_share(gamma, offset, 4).tolist() == [0.0, 1.0, -2.0, 0.0]
    assert correction_share(gamma, offset, 1).tolist() == [0.0, 4.0, -8.0, 0.0]
    assert gamma.tolist() == [0.0, 0.5, 1.0, 1.0]
    assert offset.tolist() == [8.0, 8.0, -8.0, 0.0]


def test_an_offset_decays_by_what_each_missed_round_would_have_taken():
    offset, correction = torch.tensor([8.0, -8.0, 8.0, 1.0]), torch.tensor([0.0, 0.5, 1.0, 0.25])
    assert decayed_offset(offset, correction, 1).tolist() == [8.0, -4.0, 0.0, 0.75]
    assert decayed_offset(offset, correction, 3).tolist() == [8.0, -1.0, 0.0, 0.421875]
    assert decayed_offset(offset, correction, 0) is offset
    assert offset.tolist() == [8.0, -8.0, 8.0, 1.0]
    assert correction.tolist() == [0.0, 0.5, 1.0, 0.25]
    with pytest.raises(ValueError, match="not negative, got -1"):
        decayed_offset(offset, correction, -1)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_round_without_steps_has_no_share(steps):
    with pytest.raises(ValueError, match=str(steps)):
        correction_share(torch.ones(2), torch.ones(2), steps)


# --- (b) what a whole round removes -----------------------------------------------------------


def follow_gradients(global_weights, offset, grads, *, correction, learning_rate=0.05):
    """One local update along given gradients: (weights, path, the gamma of every step).

    `path` is the sum of the gradient steps alone, in float64.
    """
    state = AlignmentState.zeros(len(offset))
    weights, steps = realigned_start(global_weights, offset), len(grads)
    path, gammas = torch.zeros(len(offset), dtype=torch.float64), []
    for grad in grads:
        step = alignment_step(state, grad, offset, correction=correction)
        weights -= learning_rate * step.preconditioner * grad
        weights -= correction_share(step.gamma, offset, steps)
        path -= learning_rate * step.preconditioner.double() * grad.double()
        gammas.append(step.gamma.double())
    return weights, path, torch.stack(gammas)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 32])
@pytest.mark.parametrize(("correction", "kept"), [("full", 0.0), ("half", 0.5), ("none", 1.0)])
def test_constant_gamma_removes_its_share_of_the_offset_exactly(correction, kept, steps):
    """gamma = 1 over T steps returns base + gradient path; 1/2 leaves half of the offset."""
    global_weights, offset, grads = random_vectors(200, 200, (steps, 200), seed=steps)
    weights, path, _ = follow_gradients(global_weights, offset, grads, correction=correction)
    expected = global_weights.double() + kept * offset.double() + path
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("correction", ["erf", "hard"])
def test_a_round_removes_the_mean_gamma_of_the_offset(correction):
    """w_T = w_g + (1 - Gamma) offset + path, Gamma = mean of gamma over the T steps."""
    global_weights, offset, grads = random_vectors(200, 200, (12, 200), seed=1)
    grads += 0.6 * offset.sign() * torch.linspace(-2, 2, 200)
    weights, path, gammas = follow_gradients(global_weights, offset, grads, correction=correction)
    mean_gamma = gammas.mean(dim=0)
    assert mean_gamma.min() < 0.2  # agreement and opposition both occur
    assert mean_gamma.max() > 0.8
    expected = global_weights.double() + (1 - mean_gamma) * offset.double() + path
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)
    new_offset = offset_after_round(weights, global_weights).double()
    torch.testing.assert_close(
        new_offset, (1 - mean_gamma) * offset.double() + path, rtol=0, atol=1e-6
    )


def test_zero_gradients_move_the_weights_by_half_the_offset_alone():
    """(i) Per step by (1/T) offset / 2: a silent coordinate loses half of its offset a round."""
    global_weights, offset = random_vectors(50, 50, seed=2)
    weights, path, _ = follow_gradients(
        global_weights, offset, torch.zeros(8, 50), correction="erf"
    )
    assert path.count_nonzero() == 0
    torch.testing.assert_close(weights, global_weights + offset / 2, rtol=0, atol=1e-6)


# --- (f) the scalar quadratic -----------------------------------------------------------------

K = [0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.9, 0.9, 0.9]
GAMMA = [1.0, 0.5, 0.0, 1.0, 0.5, 0.25, 1.0, 0.5, 0.25]


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_fixed_point_of_the_scalar_quadratic(steps):
    """offset* = (c - w_g) k / (k + gamma), k = eta T h P, with w_g, P and gamma held fixed.

    F(w) = h/2 (w - c)^2 has the gradient h (w - c); write a = eta P h = k/T. In small steps w moves
    over a round by the sum of T pulls, -k (w - c) - gamma offset, with w close to w_g + offset
    throughout. It stays where these cancel: k (w_g + offset - c) + gamma offset = 0, which is the
    claim. It is exact beyond small steps, too: with e = w - c and q = (1 - a)^T a round gives

        e_T = q e_0 - (gamma offset / k) (1 - q),    e_0 = w_g + offset - c,

    and e_T = e_0 = -gamma offset / k is the same equation. As a map of the offset a round has the
    slope q - gamma (1 - q) / k, and the iteration finds the point where that is within (-1, 1):
    always in small steps, for k + gamma < 2 at T = 1.
    """
    k, gamma = torch.tensor(K), torch.tensor(GAMMA)
    d = len(K)
    c, global_weights = random_vectors(d, d, scale=1.0, seed=3)
    h = torch.linspace(0.5, 4.0, d)
    preconditioner = torch.linspace(0.02, 1.0, d)
    learning_rate = k / (steps * h * preconditioner)

    offset = torch.zeros(d)
    for _ in range(150):
        weights = realigned_start(global_weights, offset)
        for _ in range(steps):
            grad = h * (weights - c)
            weights = weights - learning_rate * preconditioner * grad
            weights = weights - correction_share(gamma, offset, steps)
        offset = offset_after_round(weights, global_weights)

    expected = (c - global_weights) * k / (k + gamma)
    torch.testing.assert_close(offset, expected, rtol=0, atol=1e-5)


def test_fixed_point_of_a_federation_of_quadratics():
    """With equal weights and curvatures w_g becomes the mean of c_i and each offset its share.

    At rest w_g = mean(w_i), so the offsets average to 0 and w_g = mean(c_i).
    """
    steps, gamma, k = 5, torch.tensor(0.5), 0.4
    (c,) = random_vectors((4, 6), scale=1.0, seed=4)
    global_weights, offsets = torch.zeros(6), torch.zeros(4, 6)
    for _ in range(150):
        weights = realigned_start(global_weights, offsets)
        for _ in range(steps):
            weights = weights - (k / steps) * (weights - c)
            weights = weights - correction_share(gamma, offsets, steps)
        offsets = offset_after_round(weights, global_weights)
        global_weights = weights.mean(dim=0)
    torch.testing.assert_close(global_weights, c.mean(dim=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(offsets, (c - c.mean(dim=0)) * k / (k + 0.5), rtol=0, atol=1e-5)


# --- rounds of clients against the reference --------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-12])
@pytest.mark.parametrize(
    ("dtype", "atol"),
    # About 300 roundings of numbers of size 1, and no branch that could amplify them.
    [(torch.float32, 2e-5), (torch.float64, 1e-13)],
)
def test_rounds_of_local_updates_equal_algorithm_1(dtype, atol, eps):
    """Three clients, six rounds of five steps, noisy gradients, unequal weights."""
    clients, rounds, steps, d, learning_rate = 3, 6, 5, 40, 4.0
    rng = np.random.default_rng(5)
    c = rng.standard_normal((clients, d)) + rng.standard_normal(d)
    h = np.geomspace(0.05, 1.0, d)
    c[:, 0], h[1] = 0.0, 0.0
    noise = 0.3 * h * rng.standard_normal((rounds, clients, steps, d))
    shares = np.array([0.5, 0.3, 0.2])

    wanted_global, wanted_offsets = np.zeros(d), np.zeros((clients, d))
    reference_states = [ReferenceState(d) for _ in range(clients)]
    as_tensor = lambda x: torch.as_tensor(x, dtype=dtype)  # noqa: E731
    global_weights, offsets = as_tensor(np.zeros(d)), list(as_tensor(np.zeros((clients, d))))
    states = [AlignmentState.zeros(d, dtype=dtype) for _ in range(clients)]

    for r in range(rounds):
        uploads, wanted_uploads = [], []
        for i in range(clients):
            wanted, new_offset = quadratic_local_update(
                reference_states[i],
                wanted_global,
                wanted_offsets[i],
                h=h,
                c=c[i],
                noise=noise[r, i],
                eta=learning_rate,
                eps=eps,
            )
            wanted_uploads.append(wanted)
            wanted_offsets[i] = new_offset

            states[i].start_round()
            weights = realigned_start(global_weights, offsets[i])
            for t in range(steps):
                grad = as_tensor(h) * (weights - as_tensor(c[i])) + as_tensor(noise[r, i, t])
                step = alignment_step(states[i], grad, offsets[i], eps=eps)
                weights = weights - learning_rate * step.preconditioner * grad
                weights = weights - correction_share(step.gamma, offsets[i], steps)
            offsets[i] = offset_after_round(weights, global_weights)
            uploads.append(weights)
        wanted_global = shares @ np.stack(wanted_uploads)
        global_weights = (as_tensor(shares)[:, None] * torch.stack(uploads)).sum(dim=0)

    assert global_weights.dtype == offsets[0].dtype == dtype
    np.testing.assert_allclose(global_weights, wanted_global, rtol=0, atol=atol)
    np.testing.assert_allclose(torch.stack(offsets), wanted_offsets, rtol=0, atol=atol)
    assert np.abs(wanted_offsets).max() > 0.1  # something was learned


@pytest.mark.parametrize("exponent", [-20, 12])
def test_loss_times_c_and_rate_over_c_leave_the_trajectory_unchanged(exponent):
    """(j) To the bit for a power of two at eps = 0, over rounds."""

    def trajectory(loss_scale):
        (c,) = random_vectors(30, scale=1.0, seed=6)
        global_weights = offset = torch.zeros(30)
        state, points = AlignmentState.zeros(30), []
        for _ in range(4):
            state.start_round()
            weights = realigned_start(global_weights, offset)
            for _ in range(5):
                grad = loss_scale * 0.7 * (weights - c)
                step = alignment_step(state, grad, offset)
                weights = weights - (3.0 / loss_scale) * step.preconditioner * grad
                weights = weights - correction_share(step.gamma, offset, 5)
                points.append(weights)
            offset = offset_after_round(weights, global_weights)
        return torch.stack(points)

    assert torch.equal(trajectory(1.0), trajectory(2.0**exponent))
    assert trajectory(1.0).abs().max() > 0.1

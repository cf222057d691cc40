"""The state of m, v and P from step to step, and the arguments that it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pfl_lm.align import AlignmentState, alignment_step
from tests.align.sequences import (
    run,
)


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

"""The weighted mean against numpy, and what it refuses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pfl_lm.errors import AggregationError
from pfl_lm.methods.aggregate import Weighted, weighted_mean


def random_vectors(n: int, d: int = 500, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-6, 3, d)
    return [scales * torch.randn(d, generator=generator) for _ in range(n)]


def pairs(vectors: list[Tensor], weights: list[float]) -> list[Weighted]:
    return list(zip(vectors, weights, strict=True))


@pytest.mark.parametrize(
    "weights", [[1.0], [3.0, 1.0], [5, 0, 7], [0.1, 0.2, 0.3, 0.4], [1e-9, 1.0, 1e9]]
)
def test_it_is_numpys_average_in_float64_rounded_once(weights: list[float]) -> None:
    vectors = random_vectors(len(weights))
    stacked = np.stack([vector.double().numpy() for vector in vectors])
    wanted = torch.from_numpy(np.average(stacked, axis=0, weights=weights))

    mean = weighted_mean(pairs(vectors, weights))

    assert mean.dtype == torch.float32
    scale = torch.stack(vectors).double().abs().amax(dim=0)
    one_rounding = 2.0**-24 * wanted.abs() + 1e-14 * scale  # of fp32, and float64's own
    assert torch.all((mean.double() - wanted).abs() <= one_rounding)


def test_an_order_does_not_matter_to_1e_6() -> None:
    vectors, weights = random_vectors(4, seed=1), [6.0, 1.0, 2.5, 11.0]
    wanted = weighted_mean(pairs(vectors, weights))
    for order in itertools.permutations(range(4)):
        mean = weighted_mean([(vectors[i], weights[i]) for i in order])
        torch.testing.assert_close(mean, wanted, rtol=1e-6, atol=0)


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
)
def test_equal_vectors_average_to_themselves_bit_for_bit(
    weights: list[float], numbers: list[float]
) -> None:
    vector = torch.tensor(numbers, dtype=torch.float32)
    mean = weighted_mean([(vector, weight) for weight in weights])
    assert torch.equal(mean, vector)


def test_what_is_averaged_is_left_alone() -> None:
    vectors = random_vectors(3)
    before = [vector.clone() for vector in vectors]
    mean = weighted_mean(pairs(vectors, [1, 2, 3]))
    mean.zero_()
    assert all(torch.equal(a, b) for a, b in zip(vectors, before, strict=True))
    single = weighted_mean(pairs(vectors[:1], [2.0]))
    single.zero_()
    assert torch.equal(vectors[0], before[0])


ONE, OTHER = torch.zeros(2), torch.zeros(3)


@pytest.mark.parametrize(
    ("vectors", "weights", "said"),
    [
        ([], [], "cannot average 0 vectors with 0 weights"),
        ([ONE, OTHER], [1.0, 1.0], "cannot average vectors of different shapes: [(2,), (3,)]"),
        ([ONE, ONE], [0.0, 0.0], "weights must be finite, >= 0 and not all zero: [0.0, 0.0]"),
        ([ONE, ONE], [2.0, -1.0], "weights must be finite, >= 0 and not all zero: [2.0, -1.0]"),
        ([ONE], [float("nan")], "weights must be finite, >= 0 and not all zero: [nan]"),
        ([ONE], [float("inf")], "weights must be finite, >= 0 and not all zero: [inf]"),
    ],
)
def test_what_cannot_be_averaged_is_refused(
    vectors: list[Tensor], weights: list[float], said: str
) -> None:
    with pytest.raises(AggregationError) as caught:
        weighted_mean(pairs(vectors, weights))
    assert caught.value.message == said

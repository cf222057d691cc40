"""Clipped mean, median and trimmed mean against numpy, their symmetries, and what they refuse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pfl_lm.errors import AggregationError
from pfl_lm.methods.aggregate import Weighted, weighted_mean
from pfl_lm.methods.robust import clipped_mean, median, trimmed_mean
from tests.parity import reference_rules

D = 300
START = torch.logspace(-4, 2, D) * torch.randn(D, generator=torch.Generator().manual_seed(9))


def some(n: int, seed: int = 0, d: int = D) -> list[Tensor]:
    """Return ``n`` vectors around ``START`` whose changes have scales of their own."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-5, 1, d)
    return [START[:d] + scales * torch.randn(d, generator=generator) for _ in range(n)]


def weights_of(n: int) -> list[float]:
    return [float(3 * k % 7 + (k > 1)) for k in range(1, n + 1)]


def pairs(vectors: list[Tensor], weights: list[float] | None = None) -> list[Weighted]:
    return list(zip(vectors, weights or [1.0] * len(vectors), strict=True))


def changes(vectors: list[Tensor], start: Tensor = START) -> np.ndarray:
    return np.stack([(vector.double() - start.double()).numpy() for vector in vectors])


def moved(change: np.ndarray, start: Tensor = START) -> Tensor:
    """Return where a reference's change leads, rounded once."""
    return (start.double() + torch.from_numpy(change)).float()


def near(found: Tensor, wanted: Tensor) -> None:
    """Agree to one unit in the last place of fp32."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2**-23, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 40])
@pytest.mark.parametrize("clip_norm", [1e-3, 20.0, 32.0, 1e9])
def test_the_clipped_mean_is_the_references(n: int, clip_norm: float) -> None:
    vectors, weights = some(n), weights_of(n)
    found = clipped_mean(pairs(vectors, weights), START, clip_norm)
    near(found, moved(reference_rules.clipped_mean(changes(vectors), weights, clip_norm)))


def test_some_are_clipped_and_some_are_not() -> None:
    """What the reference is compared on above is both sides of the bound."""
    lengths = np.linalg.norm(changes(some(40)), axis=1)
    assert 1e-3 < 20 < lengths.min() < 32 < lengths.max() < 1e9


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 40])
def test_the_median_is_numpys(n: int) -> None:
    vectors = some(n)
    near(median(pairs(vectors, weights_of(n))), moved(reference_rules.median(changes(vectors))))


@pytest.mark.parametrize(("n", "cut"), [(1, 0), (3, 1), (4, 1), (9, 0), (9, 2), (9, 4), (40, 13)])
def test_the_trimmed_mean_is_sort_and_cut(n: int, cut: int) -> None:
    vectors = some(n)
    found = trimmed_mean(pairs(vectors, weights_of(n)), cut)
    near(found, moved(reference_rules.trimmed_mean(changes(vectors), cut)))


def test_by_hand() -> None:
    """Four clients, two coordinates, w_g = (1, 1)."""
    start = torch.tensor([1.0, 1.0])
    vectors = [torch.tensor(pair) for pair in ([4.0, 5.0], [1.0, 1.5], [0.0, 1.0], [1.0, 9.0])]
    # d: (3, 4) of length 5, (0, ½) of ½, (-1, 0) of 1, (0, 8) of 8; C = 1, weights 1, 2, 3, 4:
    # (1/10)(3/5 - 3, 4/5 + 2·½ + 4·1) = (-0.24, 0.58)
    found = clipped_mean(pairs(vectors, [1.0, 2.0, 3.0, 4.0]), start, 1.0)
    torch.testing.assert_close(found, torch.tensor([0.76, 1.58]))
    # sorted: 0 1 1 4 and 1 1.5 5 9
    assert median(pairs(vectors)).tolist() == [1.0, 3.25]
    assert trimmed_mean(pairs(vectors), 1).tolist() == [1.0, 3.25]
    assert trimmed_mean(pairs(vectors), 0).tolist() == [1.5, 4.125]


Rule = Callable[[list[Weighted]], Tensor]
RULES: list[tuple[str, Rule]] = [
    ("clipped", lambda weighted: clipped_mean(weighted, START, 30.0)),
    ("median", median),
    ("trimmed", lambda weighted: trimmed_mean(weighted, (len(weighted) - 1) // 3)),
]
every_rule = pytest.mark.parametrize("rule", [rule for _, rule in RULES], ids=[n for n, _ in RULES])


@every_rule
def test_the_order_does_not_matter(rule: Rule) -> None:
    weighted = pairs(some(5), weights_of(5))
    wanted = rule(weighted)
    for order in itertools.permutations(weighted):
        torch.testing.assert_close(rule(list(order)), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", [rule for _, rule in RULES[1:]], ids=["median", "trimmed"])
def test_the_order_does_not_matter_to_the_bit_where_it_is_sorted(rule: Rule) -> None:
    weighted = pairs([*some(4), torch.zeros(D), -torch.zeros(D)])
    wanted = rule(weighted)
    for order in itertools.permutations(weighted):
        assert rule(list(order)).numpy().tobytes() == wanted.numpy().tobytes()


@every_rule
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_equal_uploads_are_what_comes_of_them(rule: Rule, n: int) -> None:
    one = START + 1e-2
    torch.testing.assert_close(rule(pairs([one] * n, weights_of(n))), one, rtol=2**-23, atol=0)
    assert torch.equal(rule(pairs([START] * n, weights_of(n))), START)


@given(
    st.integers(1, 9),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
)
def test_equal_uploads_stay_to_the_bit_where_it_is_sorted(n: int, numbers: list[float]) -> None:
    vector = torch.tensor(numbers, dtype=torch.float32)
    weighted = [(vector, 1.0)] * n
    for rule in (median, lambda same: trimmed_mean(same, (n - 1) // 3)):
        assert torch.equal(rule(weighted), vector)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_long_enough_clip_is_the_weighted_mean(n: int) -> None:
    weighted = pairs(some(n), weights_of(n))
    found, mean = clipped_mean(weighted, START, 1e30), weighted_mean(weighted)
    torch.testing.assert_close(found, mean, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_nothing_trimmed_is_the_unweighted_mean(n: int) -> None:
    vectors = some(n)
    found = trimmed_mean(pairs(vectors, weights_of(n)), 0)
    torch.testing.assert_close(found, weighted_mean(pairs(vectors)), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2])
def test_the_median_of_one_or_two_is_their_unweighted_mean(n: int) -> None:
    vectors = some(n)
    found = median(pairs(vectors, weights_of(n)))
    torch.testing.assert_close(found, weighted_mean(pairs(vectors)), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("n", [3, 4, 9, 10])
def test_all_trimmed_but_the_middle_is_the_median(n: int) -> None:
    weighted = pairs(some(n))
    assert torch.equal(median(weighted), trimmed_mean(weighted, (n - 1) // 2))


def test_a_weight_of_0_leaves_the_clipped_mean_and_not_the_others() -> None:
    vectors = some(4)
    weighted = pairs(vectors, [2.0, 0.0, 1.0, 3.0])
    without = [weighted[0], *weighted[2:]]
    for rule, heeds in ((RULES[0][1], True), (median, False), (RULES[2][1], False)):
        assert torch.equal(rule(weighted), rule(without)) == heeds
    assert torch.equal(median(weighted), median(pairs(vectors, [1e9, 1.0, 1.0, 5.0])))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("width", [1, 7, 64, 299, 300])
def test_chunks_give_the_bits_of_one_chunk(n: int, width: int) -> None:
    weighted = pairs(some(n), weights_of(n))
    small = width * 4 * n
    assert torch.equal(median(weighted, small), median(weighted))
    cut = (n - 1) // 3
    assert torch.equal(trimmed_mean(weighted, cut, small), trimmed_mean(weighted, cut))


def test_a_chunk_is_never_less_than_a_coordinate() -> None:
    weighted = pairs(some(5, d=20))
    assert torch.equal(median(weighted, 1), median(weighted))


@every_rule
def test_what_is_averaged_is_left_alone(rule: Rule) -> None:
    vectors, start = some(4), START.clone()
    before = [vector.clone() for vector in vectors]
    for weighted in (pairs(vectors), pairs(vectors[:1])):
        rule(weighted).zero_()
    assert all(torch.equal(a, b) for a, b in zip(vectors, before, strict=True))
    assert torch.equal(START, start)


def test_the_largest_numbers_of_fp32_stay_finite() -> None:
    """A change may be twice the largest fp32 number, its square far beyond it."""
    largest = torch.full((D,), torch.finfo(torch.float32).max)
    vectors = [largest, largest, -largest]
    for _, rule in RULES:
        assert torch.isfinite(rule(pairs(vectors))).all()
    bound = clipped_mean(pairs(vectors), torch.zeros(D), 1.0)
    assert float(bound.norm()) == pytest.approx(1 / 3)  # two of three point one way


@given(st.integers(1, 6), st.floats(1e-3, 1e3), st.integers(0, 5))
def test_no_upload_moves_the_clipped_mean_further_than_its_share(
    n: int, clip_norm: float, seed: int
) -> None:
    vectors, weights = some(n, seed), weights_of(n)
    attacker = (torch.full((D,), 1e30), 4.0)
    found = clipped_mean([*pairs(vectors, weights), attacker], START, clip_norm)
    still = clipped_mean([*pairs(vectors, weights), (START, 4.0)], START, clip_norm)
    share = 4.0 / (sum(weights) + 4.0)
    rounding = 1e-6 * float(START.norm())
    assert float((found - still).double().norm()) <= share * clip_norm + rounding
    assert float((found - START).double().norm()) <= clip_norm + rounding


@given(st.integers(3, 12), st.integers(0, 99))
def test_the_sorted_rules_stay_among_the_honest(n: int, seed: int) -> None:
    """As many liars as are cut on a side, all as large as they can be, on any side."""
    rng = np.random.default_rng(seed)
    n_liars = int(rng.integers(1, (n - 1) // 2 + 1))
    honest = some(n - n_liars, seed, d=40)
    lies = [torch.from_numpy(rng.choice([-3e38, 3e38], 40)).float() for _ in range(n_liars)]
    weighted = pairs([*lies, *honest])
    low, high = torch.stack(honest).amin(dim=0), torch.stack(honest).amax(dim=0)
    for found in (median(weighted), trimmed_mean(weighted, n_liars)):
        assert torch.all((low <= found) & (found <= high))


ZERO, ONE, OTHER = torch.zeros(2), torch.ones(2), torch.zeros(3)
NAN = torch.tensor([1.0, math.nan])
REFUSED = [
    ([], [], "cannot average 0 vectors with 0 weights"),
    ([ONE, OTHER], [1.0, 1.0], "cannot average vectors of different shapes: [(2,), (3,)]"),
    ([OTHER, ONE], [1.0, 1.0], "cannot average vectors of different shapes: [(3,), (2,)]"),
    ([ONE, ONE], [0.0, 0.0], "weights must be finite, >= 0 and not all zero: [0.0, 0.0]"),
    ([ONE, ONE], [2.0, -1.0], "weights must be finite, >= 0 and not all zero: [2.0, -1.0]"),
    ([ONE], [math.nan], "weights must be finite, >= 0 and not all zero: [nan]"),
    (
        [ONE, NAN, torch.full((2,), -math.inf)],
        [1.0, 1.0, 1.0],
        "uploads, here in the order of client ids, must be finite: "
        "1 of 2 numbers of upload 2 are not, the first is nan at 1; "
        "2 of 2 numbers of upload 3 are not, the first is -inf at 0",
    ),
    (
        [NAN] * 8,
        [1.0] * 8,
        "uploads, here in the order of client ids, must be finite: "
        + "".join(
            f"1 of 2 numbers of upload {k} are not, the first is nan at 1; " for k in range(1, 6)
        )
        + "and 3 more",
    ),
]
SMALL_RULES: list[Rule] = [
    weighted_mean,
    lambda weighted: clipped_mean(weighted, ZERO, 1.0),
    median,
    lambda weighted: trimmed_mean(weighted, 0),
]


@pytest.mark.parametrize("rule", SMALL_RULES, ids=["mean", "clipped", "median", "trimmed"])
@pytest.mark.parametrize(("vectors", "weights", "said"), REFUSED)
def test_what_cannot_be_averaged_is_refused(
    rule: Rule, vectors: list[Tensor], weights: list[float], said: str
) -> None:
    with pytest.raises(AggregationError) as caught:
        rule(pairs(vectors, weights))
    assert caught.value.message == said


def test_a_change_needs_the_shape_of_the_global_weights() -> None:
    with pytest.raises(AggregationError) as caught:
        clipped_mean(pairs([OTHER, OTHER]), ZERO, 1.0)
    assert caught.value.message == (
        "cannot average vectors of shape (3,) from weights of shape (2,)"
    )

"""Flat vectors and their matrices: nothing is lost, moved or copied by accident."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.layout import AdapterLayout, Factor

LAYOUT = AdapterLayout.of(
    [
        ("layers.0.q", "A", (2, 3)),
        ("layers.0.q", "B", (4, 2)),
        ("layers.1.v", "A", (1, 3)),
        ("layers.1.v", "B", (5, 1)),
    ]
)


def counting() -> torch.Tensor:
    return torch.arange(LAYOUT.d, dtype=torch.float32)


def test_matrices_lie_one_after_another_in_the_order_given() -> None:
    assert [(e.name, e.start, e.stop) for e in LAYOUT.entries] == [
        ("layers.0.q.A", 0, 6),
        ("layers.0.q.B", 6, 14),
        ("layers.1.v.A", 14, 17),
        ("layers.1.v.B", 17, 22),
    ]
    assert LAYOUT.d == 22
    assert AdapterLayout.of([]).d == 0


def test_pairs_are_the_two_factors_of_one_module() -> None:
    names = [(a.name, b.name) for a, b in LAYOUT.pairs]
    assert names == [("layers.0.q.A", "layers.0.q.B"), ("layers.1.v.A", "layers.1.v.B")]


def test_split_gives_views_in_row_order() -> None:
    vector = counting()
    named = LAYOUT.split(vector)
    assert named["layers.0.q.A"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert named["layers.1.v.A"].tolist() == [[14, 15, 16]]
    named["layers.0.q.B"].fill_(-1)
    assert vector[6:14].tolist() == [-1] * 8
    assert (vector[5], vector[14]) == (5, 14)


@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), min_size=0, max_size=6)
)
def test_join_undoes_split(shapes: list[tuple[int, ...]]) -> None:
    layout = AdapterLayout.of((f"m{i}", "A", shape) for i, shape in enumerate(shapes))
    vector = torch.randn(layout.d)
    assert torch.equal(layout.join(layout.split(vector)), vector)


def test_join_goes_by_name_and_returns_fp32_of_its_own() -> None:
    vector = counting()
    named = {name: part.bfloat16() for name, part in reversed(LAYOUT.split(vector).items())}
    joined = LAYOUT.join(named)
    assert joined.dtype == torch.float32
    assert torch.equal(joined, vector)
    joined.zero_()
    assert vector[1] == 1


def test_what_does_not_fit_is_refused() -> None:
    named = LAYOUT.split(counting())
    lacking = {name: part for name, part in named.items() if name != "layers.1.v.B"}
    with pytest.raises(ValueError, match=r"names differ from the layout: \['layers.1.v.B'\]"):
        LAYOUT.join(lacking)
    with pytest.raises(ValueError, match=r"names differ from the layout: \['more'\]"):
        LAYOUT.join({**named, "more": torch.zeros(1)})
    turned = {**named, "layers.0.q.A": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=r"layers.0.q.A: expected shape \(2, 3\), got \(3, 2\)"):
        LAYOUT.join(turned)
    with pytest.raises(ValueError, match=r"expected a vector of shape \(22,\), got \(21,\)"):
        LAYOUT.split(torch.zeros(21))
    with pytest.raises(ValueError, match="named twice"):
        AdapterLayout.of([("q", "A", (1,)), ("q", "A", (2,))])


def test_masks_divide_the_vector_by_factor() -> None:
    a, b = LAYOUT.mask("A"), LAYOUT.mask("B")
    assert torch.equal(a, ~b)
    assert a.nonzero().flatten().tolist() == [*range(6), *range(14, 17)]


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_is_taken_out_and_put_back(factor: Factor) -> None:
    vector = counting()
    part = LAYOUT.factor(vector, factor)
    own = [e for e in LAYOUT.entries if e.factor == factor]
    assert part.tolist() == [float(i) for e in own for i in range(e.start, e.stop)]

    changed = LAYOUT.with_factor(vector, factor, -part)

    assert torch.equal(LAYOUT.factor(changed, factor), -part)
    other = "B" if factor == "A" else "A"
    assert torch.equal(LAYOUT.factor(changed, other), LAYOUT.factor(vector, other))
    part.zero_()
    assert torch.equal(vector, counting())


def test_a_factor_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected A factors of shape \(9,\), got \(13,\)"):
        LAYOUT.with_factor(counting(), "A", torch.zeros(13))
    with pytest.raises(ValueError, match=r"expected B factors of shape \(13,\), got \(1,\)"):
        LAYOUT.with_factor(counting(), "B", torch.zeros(1))


def test_without_effect_zeroes_every_B_in_a_copy() -> None:
    vector = counting() + 1
    without = LAYOUT.without_effect(vector)
    assert without[LAYOUT.mask("B")].count_nonzero() == 0
    assert torch.equal(without[LAYOUT.mask("A")], vector[LAYOUT.mask("A")])
    assert torch.equal(vector, counting() + 1)


def test_matrix_rms_is_taken_within_each_matrix() -> None:
    vector = counting()
    rms = LAYOUT.matrix_rms(vector)
    for entry in LAYOUT.entries:
        part = range(entry.start, entry.stop)
        wanted = (sum(i * i for i in part) / len(part)) ** 0.5
        torch.testing.assert_close(rms[entry.start : entry.stop], torch.full((len(part),), wanted))
    assert torch.equal(vector, counting())

"""A smaller adapter among the numbers of a larger one."""

from __future__ import annotations

import pytest
import torch

from pfl_lm.layout import AdapterLayout

WHOLE = AdapterLayout.of(
    [
        ("0.self.q", "A", (2, 3)),
        ("0.self.q", "B", (4, 2)),
        ("0.mlp.xq", "A", (2, 3)),
        ("0.mlp.xq", "B", (3, 2)),
    ]
)


def test_rows_of_a_and_columns_of_b_are_taken_in_order() -> None:
    """Numbered 0 to 25: A is 2 x 3, its first row 0 to 2; B is 4 x 2, its first column 6, 8, …"""
    own = WHOLE.narrowed(1, ["q"])
    assert [(e.name, e.shape) for e in own.entries] == [
        ("0.self.q.A", (1, 3)),
        ("0.self.q.B", (4, 1)),
    ]
    numbers = torch.arange(26.0)
    assert WHOLE.taken(numbers, own).tolist() == [0, 1, 2, 6, 8, 10, 12]
    filled = WHOLE.filled(WHOLE.taken(numbers, own), own)
    assert torch.equal(filled != 0, WHOLE.where(own) & (numbers != 0))
    assert torch.equal(filled[WHOLE.where(own)], numbers[WHOLE.where(own)])


def test_a_module_is_named_by_the_end_of_its_path() -> None:
    assert {e.module for e in WHOLE.narrowed(2, ["mlp.xq"]).entries} == {"0.mlp.xq"}
    assert WHOLE.narrowed(2, ["q", "xq"]) == WHOLE
    assert WHOLE.narrowed(5, ["q", "xq"]) == WHOLE


def test_the_whole_is_taken_as_it_is() -> None:
    numbers = torch.arange(26.0)
    assert WHOLE.taken(numbers, WHOLE) is numbers
    assert WHOLE.filled(numbers, WHOLE) is numbers
    with pytest.raises(ValueError, match=r"expected a vector of shape \(7,\), got \(8,\)"):
        WHOLE.filled(torch.zeros(8), WHOLE.narrowed(1, ["q"]))

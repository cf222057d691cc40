from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.data.examples import Example


def test_an_example_counts_its_supervised_tokens():
    assert Example((5, 6, 7, 8), ((1, 3),)).n_supervised == 2
    assert Example((5, 6, 7, 8, 9), ((1, 3), (4, 5))).n_supervised == 3
    assert Example((5, 6), ()).n_supervised == 0


def test_a_cut_may_leave_nothing_supervised():
    assert Example((5, 6, 7, 8), ((2, 4),)).cut(1) == Example((5,), ())
    assert Example((5, 6, 7, 8), ((2, 4),)).cut(2) == Example((5, 6), ())


def test_a_cut_goes_through_the_span_it_meets():
    whole = Example(tuple(range(9)), ((1, 3), (4, 7), (8, 9)))
    assert whole.cut(5) == Example(tuple(range(5)), ((1, 3), (4, 5)))
    assert whole.cut(9) == whole.cut(99) == whole


@given(st.lists(st.integers(1, 3), max_size=8), st.integers(1, 20))
def test_a_cut_keeps_the_supervised_tokens_before_it(lengths, max_length):
    spans, end = [], 0
    for i, length in enumerate(lengths):
        end += length
        if i % 2:
            spans.append((end - length, end))
    whole = Example(tuple(range(end)), tuple(spans))
    cut = whole.cut(max_length)
    supervised = {i for first, last in whole.spans for i in range(first, last)}
    assert {i for first, last in cut.spans for i in range(first, last)} == {
        i for i in supervised if i < max_length
    }
    assert all(first < last for first, last in cut.spans)

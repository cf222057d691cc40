from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.data.batches import collate, evaluation_batches, training_batches
from pfl_lm.data.examples import Example

PAD = 9


def example(length, first, last, start=0):
    return Example(tuple(range(start, start + length)), ((first, last),) if first < last else ())


def marked(n):
    """Examples told apart by their first token, of unequal lengths and supervised counts."""
    return [Example((100 + i, *range(i % 5 + 3)), ((1, 2 + i % 3),)) for i in range(n)]


def loader(examples, *, steps=3, accumulation=2, batch_size=2, seed=5, **how):
    return training_batches(
        examples,
        steps=steps,
        accumulation=accumulation,
        batch_size=batch_size,
        pad_token_id=PAD,
        seed=seed,
        **how,
    )


def rows_seen(batches):
    return [[i - 100 for i in batch["input_ids"][:, 0].tolist()] for batch in batches]


def test_collate_pads_on_the_right_and_marks_by_position():
    # Token 9 is padding and a supervised token too, as where pad and end of turn are the same.
    batch = collate([Example((1, 2, 9), ((1, 3),)), Example((9, 5, 6, 7, 9), ((2, 4),))], PAD)

    assert batch.pop("rows").ids == ((1, 2, 9), (9, 5, 6, 7, 9))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 9, 9, 9], [9, 5, 6, 7, 9]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "labels": [[-100, 2, 9, -100, -100], [-100, -100, 6, 7, -100]],
        "positions": [0, 1, 6, 7],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_every_span_is_marked():
    batch = collate([Example((1, 2, 3, 4, 5, 6), ((1, 3), (5, 6))), Example((7,), ())], PAD)
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100, 6], [-100] * 6]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)), min_size=1))
def test_labels_count_what_the_examples_count(shapes):
    examples = [
        example(n, min(first, n), min(max(first, last), n), start=1000 * i)
        for i, (n, first, last) in enumerate(shapes)
    ]
    batch = collate(examples, PAD)
    supervised = batch["labels"] != -100
    assert supervised.sum(1).tolist() == [e.n_supervised for e in examples]
    assert torch.equal(batch["labels"][supervised], batch["input_ids"][supervised])
    assert batch["attention_mask"].sum(1).tolist() == [len(e.input_ids) for e in examples]


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_exactly_the_micro_batches_of_the_turn(accumulation):
    batches = list(loader(marked(7), steps=5, accumulation=accumulation))
    assert len(batches) == len(loader(marked(7), steps=5, accumulation=accumulation))
    assert len(batches) == 5 * accumulation


def test_each_micro_batch_carries_the_tokens_of_its_window():
    examples = marked(7)
    batches = list(loader(examples, steps=6, accumulation=3, batch_size=2))
    for start in range(0, 18, 3):
        window = batches[start : start + 3]
        counted = sum(int((batch["labels"] != -100).sum()) for batch in window)
        assert [batch["window_tokens"] for batch in window] == [counted] * 3
        assert all(type(batch["window_tokens"]) is int for batch in window)
    assert len({batch["window_tokens"] for batch in batches}) > 1


def test_each_pass_sees_every_row_once():
    seen = rows_seen(loader(marked(5), steps=9, accumulation=1, batch_size=2))
    assert [len(batch) for batch in seen] == [2, 2, 1] * 3
    passes = [[*seen[i], *seen[i + 1], *seen[i + 2]] for i in (0, 3, 6)]
    assert all(Counter(one) == Counter(range(5)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_a_batch_is_no_larger_than_the_client():
    seen = rows_seen(loader(marked(3), steps=4, accumulation=1, batch_size=64))
    assert [sorted(batch) for batch in seen] == [[0, 1, 2]] * 4
    assert rows_seen(loader(marked(1), steps=2, accumulation=2, batch_size=8)) == [[0]] * 4


def test_the_order_follows_from_the_seed_alone():
    batches = loader(marked(9), seed=1)
    first = rows_seen(batches)
    torch.manual_seed(123)
    assert rows_seen(batches) == first  # iterating again
    assert rows_seen(loader(marked(9), seed=1)) == first
    assert rows_seen(loader(marked(9), seed=2)) != first
    assert rows_seen(loader(marked(9), seed=2**63 - 1)) != first  # as large as derive_seed makes it


def test_golden_order():
    """A change here would change every run."""
    assert rows_seen(loader(marked(5), steps=3, accumulation=1, seed=0)) == [[4, 0], [1, 3], [2]]


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(marked(5)))
    list(evaluation_batches(marked(5), 2, PAD))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_padded_only_when_asked_for(monkeypatch):
    asked = []

    def spy(examples, pad_token_id):
        asked.append(len(examples))
        return collate(examples, pad_token_id)

    monkeypatch.setattr("pfl_lm.data.batches.collate", spy)
    batches = iter(loader(marked(5), steps=100))
    assert asked == []
    next(batches)
    assert asked == [2]


def test_a_turn_needs_examples_and_steps():
    with pytest.raises(ValueError, match="a client turn needs at least one example"):
        loader([])
    for wrong in ("steps", "accumulation", "batch_size"):
        with pytest.raises(ValueError, match="must be at least 1, got "):
            loader(marked(2), **{wrong: 0})


@given(st.lists(st.integers(2, 6), max_size=12), st.integers(1, 5))
def test_evaluation_sees_each_example_once_longest_first(lengths, batch_size):
    examples = [example(n, 1, n, start=100 * i) for i, n in enumerate(lengths)]
    positions, widths = [], []
    for chosen, batch in evaluation_batches(examples, batch_size, PAD):
        assert 0 < len(chosen) <= batch_size
        for row, i in enumerate(chosen):
            n = len(examples[i].input_ids)
            assert tuple(batch["input_ids"][row, :n].tolist()) == examples[i].input_ids
            widths.append(n)
        positions += chosen
    assert sorted(positions) == list(range(len(examples)))
    assert widths == sorted(lengths, reverse=True)


def test_accumulation_changes_nothing_in_the_sum():
    """One window of three micro-batches holds the tokens of one batch of all its rows."""
    whole = list(loader(marked(6), steps=1, accumulation=1, batch_size=6))
    parts = list(loader(marked(6), steps=1, accumulation=3, batch_size=2))
    assert whole[0]["window_tokens"] == parts[0]["window_tokens"]

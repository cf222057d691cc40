import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.data.content import PromptCompletion
from pfl_lm.data.sources import Record
from pfl_lm.data.splits import split_clients
from pfl_lm.errors import DataError


def record(client, prompt, split="train", line=1, completion="c"):
    return Record(client, split, PromptCompletion(prompt, completion), line)


def distinct(client, n):
    return [record(client, f"p{i}", line=i + 1) for i in range(n)]


def content(rows):
    return Counter((row.content.prompt, row.content.completion) for row in rows)


@pytest.mark.parametrize(
    ("n", "fraction", "expected"),
    [(2, 0.1, 1), (10, 0.1, 1), (16, 0.125, 2), (100, 0.3, 30), (7, 0.5, 4), (5, 0.5, 2)],
)
def test_a_share_of_distinct_rows_is_held_out(n, fraction, expected):
    rows = split_clients(distinct("a", n), fraction)["a"]
    assert (len(rows.train), len(rows.validation), rows.test) == (n - expected, expected, ())


def test_the_hash_is_what_it_was():
    """Golden: a change here would reshuffle the validation rows of every run."""
    rows = split_clients(distinct("a", 20) + distinct("Ünï", 20), 0.2)
    held_out = {client: [row.line for row in split.validation] for client, split in rows.items()}
    assert held_out == {"a": [6, 8, 9, 16], "Ünï": [3, 4, 14, 20]}


def test_clients_are_sorted_and_file_order_is_kept():
    records = [record(c, f"p{i}", line=i) for i, c in enumerate("bcabcaabcbca")]
    clients = split_clients(records, 0.25)
    assert list(clients) == ["a", "b", "c"]
    for rows in clients.values():
        for split in (rows.train, rows.validation):
            assert [row.line for row in split] == sorted(row.line for row in split)


def test_the_files_own_validation_rows_are_kept():
    records = [
        record("a", "1"),
        record("a", "2", "validation"),
        record("a", "3", "test"),
        record("a", "4"),
    ]
    rows = split_clients(records, 0.5)["a"]
    assert [row.content.prompt for row in rows.train] == ["1", "4"]
    assert [row.content.prompt for row in rows.validation] == ["2"]
    assert [row.content.prompt for row in rows.test] == ["3"]


def test_test_rows_are_never_held_out():
    records = [*distinct("a", 4), *(record("a", f"t{i}", "test") for i in range(9))]
    rows = split_clients(records, 0.25)["a"]
    assert (len(rows.train), len(rows.validation), len(rows.test)) == (3, 1, 9)


rows_of_a_client = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xyz")), min_size=2, max_size=30
).filter(lambda rows: len(set(rows)) > 1)
fractions = st.floats(0.01, 0.5)


def held_out(records, fraction, client="a"):
    try:
        return split_clients(records, fraction)[client]
    except DataError:
        return None


@given(rows_of_a_client, fractions, st.randoms())
def test_neither_row_order_nor_other_clients_matter(pairs, fraction, random):
    records = [record("a", p, completion=c, line=i) for i, (p, c) in enumerate(pairs)]
    others = distinct("b", 5)
    before = held_out(records, fraction)
    shuffled = records + others
    random.shuffle(shuffled)
    after = held_out(shuffled, fraction)
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert content(after.validation) == content(before.validation)
        assert content(after.train) == content(before.train)


@given(rows_of_a_client, fractions)
def test_equal_rows_stay_on_one_side_and_none_is_lost(pairs, fraction):
    records = [record("a", p, completion=c, line=i) for i, (p, c) in enumerate(pairs)]
    rows = held_out(records, fraction)
    if rows is None:
        return
    train, validation = content(rows.train), content(rows.validation)
    assert not train.keys() & validation.keys()
    assert train + validation == Counter(pairs)
    assert len(rows.validation) >= max(1, round(fraction * len(pairs)))


def test_the_border_between_prompt_and_completion_counts():
    records = [record("a", "ab", completion=str(i)) for i in range(6)]
    moved = [record("a", "a", completion=f"b{i}") for i in range(6)]
    first, second = (split_clients(rows, 0.5)["a"] for rows in (records, moved))
    assert [r.content.completion for r in first.train] != [
        r.content.completion[1:] for r in second.train
    ]


def test_hash_randomization_plays_no_part():
    code = (
        "from tests.data.test_splits import distinct, split_clients\n"
        "print([r.line for r in split_clients(distinct('a', 50), 0.3)['a'].validation])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_clients_that_cannot_be_split_are_all_named():
    records = [*distinct("a", 8), *distinct("b", 1), *[record("c", "same")] * 3]
    with pytest.raises(DataError) as caught:
        split_clients(records, 0.25)
    assert str(caught.value) == (
        "data: 2 problems\n"
        "  client 'b': all 1 of its train rows would be held out for validation, "
        "and none left to train on\n"
        "  client 'c': all 3 of its train rows would be held out for validation, "
        "and none left to train on\n"
        "  hint: give these clients more rows, or lower data.validation_fraction (0.25)"
    )


def test_clients_without_validation_rows_of_their_own_are_named():
    records = [record("a", "1"), record("a", "2", "validation"), record("b", "1"), record("c", "1")]
    with pytest.raises(DataError) as caught:
        split_clients([*records, record("d", "1", "validation")], 0.25)
    assert str(caught.value) == (
        "data: 3 problems\n"
        "  client 'b': no validation rows\n"
        "  client 'c': no validation rows\n"
        "  client 'd': no train rows\n"
        "  hint: the file has validation rows of its own, so every client needs some of both kinds"
    )


def test_a_client_of_test_rows_only_is_named():
    with pytest.raises(DataError, match=r"client 'b': no train rows"):
        split_clients([*distinct("a", 4), record("b", "1", "test")], 0.25)

"""Rows of one group stay on one side, whoever draws the border."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.data.content import Text
from pfl_lm.data.sources import Record, read_records
from pfl_lm.data.splits import split_clients
from pfl_lm.errors import DataError
from tests.data.files import problems, write
from tests.data.test_tables import write_csv


def rows_of(client, groups, start=1):
    """One row for each name in ``groups``, no two of the same text."""
    return [
        Record(client, "train", Text(f"{client} {line}"), line, group=group)
        for line, group in enumerate(groups, start)
    ]


def held_out(groups, fraction, client="a"):
    rows = split_clients(rows_of(client, groups), fraction)[client]
    return Counter(row.group for row in rows.validation)


documents = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40).filter(
    lambda groups: len(set(groups)) > 1
)
fractions = st.floats(0.01, 0.99)


@given(documents, fractions)
def test_no_group_is_torn_and_none_is_lost(groups, fraction):
    rows = split_clients(rows_of("a", groups), fraction)["a"]
    train, validation = (
        Counter(row.group for row in side) for side in (rows.train, rows.validation)
    )
    assert train
    assert validation
    assert not train.keys() & validation.keys()
    assert train + validation == Counter(groups)


@given(documents, fractions)
def test_as_much_is_held_out_as_fits_and_at_least_one_group(groups, fraction):
    sizes = Counter(groups)
    out = held_out(groups, fraction)
    share = max(1, round(fraction * len(groups)))
    if out.total() > share:
        assert list(out.values()) == [min(sizes.values())]
    else:  # no other group would have fitted as well, but for the last that must stay
        left = [size for group, size in sizes.items() if group not in out]
        room = min(share, len(groups) - 1) - out.total()
        assert all(size > room for size in left)


@given(documents, fractions, st.randoms())
def test_neither_row_order_nor_other_clients_matter(groups, fraction, random):
    before = held_out(groups, fraction)
    records = rows_of("a", groups) + rows_of("b", "abcdef")
    random.shuffle(records)
    after = split_clients(records, fraction)["a"]
    assert Counter(row.group for row in after.validation) == before


@given(st.integers(2, 30), fractions)
def test_groups_of_one_row_are_held_out_like_rows(n, fraction):
    share = max(1, round(fraction * n))
    assert held_out([str(i) for i in range(n)], fraction).total() == min(share, n - 1)


def test_the_hash_is_what_it_was():
    """Golden: a change here would reshuffle the validation rows of every run with groups."""
    groups = [f"d{i % 9}" for i in range(45)]
    assert sorted(held_out(groups, 0.25)) == ["d1", "d3"]
    assert sorted(held_out(groups, 0.25, client="Ünï")) == ["d4", "d5"]


def test_if_no_group_fits_the_smallest_is_held_out():
    for order in ("aaaaabbbccccccccc", "bbbcccccccccaaaaa"):
        assert held_out(order, 0.05) == {"b": 3}
    for names in ("abc", "bca", "cab"):
        big, small, bigger = names
        assert held_out(big * 5 + small * 3 + bigger * 9, 0.05) == {small: 3}


def test_equal_rows_go_with_their_group():
    same = [Record("a", "train", Text("x"), i, group=g) for i, g in enumerate("aabbcc", 1)]
    rows = split_clients(same, 0.3)["a"]
    assert (len(rows.train), len(rows.validation)) == (4, 2)


def test_the_same_name_with_two_clients_is_two_groups():
    records = rows_of("a", "xxyy") + [
        Record("b", split, Text(str(i)), i, group=group)
        for i, (group, split) in enumerate([("x", "test"), ("y", "train"), ("z", "train")])
    ]
    assert list(split_clients(records, 0.5)) == ["a", "b"]


def test_a_client_of_one_group_is_named():
    records = rows_of("a", "xyz") + rows_of("b", ["only"] * 4) + rows_of("c", ["one"])
    with pytest.raises(DataError) as caught:
        split_clients(records, 0.25)
    assert str(caught.value) == (
        "data: 2 problems\n"
        "  client 'b': all 4 of its train rows are of one group, 'only'\n"
        "  client 'c': all 1 of its train rows are of one group, 'one'\n"
        "  hint: each client needs rows of two groups: one to train on, one to hold out"
    )


def test_a_group_on_both_sides_is_an_error(tmp_path):
    sides = [("a", 1, "train"), ("a", 2, "test"), ("a", 1, "test"), ("b", 1, "test")]
    sides += [("a", 3, "validation"), ("a", 3, "test"), ("b", 2, "train"), ("a", 1, "test")]
    sides += [("b", 3, "validation"), ("b", 3, "train"), ("a", 4, "validation"), ("b", 3, "test")]
    rows = [{"client": c, "doc": d, "split": s, "text": "x"} for c, d, s in sides]
    options = write(tmp_path, *rows)
    options.group_column, options.split_column = "doc", "split"
    with pytest.raises(DataError) as caught:
        split_clients(read_records(options), 0.25)
    assert str(caught.value) == (
        "data: 3 problems\n"
        "  client 'a': the group '1' stands in train (line 1) and test (line 3)\n"
        "  client 'a': the group '3' stands in validation (line 5) and test (line 6)\n"
        "  client 'b': the group '3' stands in train (line 10) and validation (line 9) "
        "and test (line 12)\n"
        "  hint: keep all rows of a group in the same split"
    )


def test_groups_are_kept_by_the_files_own_validation_rows(tmp_path):
    rows = [
        {"client": "a", "doc": doc, "split": split, "text": f"{i}"}
        for i, (doc, split) in enumerate([("x", "train"), ("y", "validation"), ("z", "test")] * 2)
    ]
    options = write(tmp_path, *rows)
    options.group_column, options.split_column = "doc", "split"
    [rows] = split_clients(read_records(options), 0.25).values()
    assert [{row.group for row in side} for side in (rows.train, rows.validation, rows.test)] == [
        {"x"},
        {"y"},
        {"z"},
    ]


def test_equal_rows_in_two_splits_of_the_file_are_left_where_they_are(tmp_path):
    """What the file says about its splits is not second-guessed."""
    row = {"client": "a", "text": "x"}
    sides = ["train", "test", "train", "validation"]
    options = write(tmp_path, *[row | {"split": side} for side in sides])
    options.split_column = "split"
    [rows] = split_clients(read_records(options), 0.25).values()
    assert [row.line for side in (rows.train, rows.validation, rows.test) for row in side] == [
        1,
        3,
        4,
        2,
    ]


def test_a_group_may_be_a_number(tmp_path):
    options = write(tmp_path, *[{"client": "a", "doc": doc, "text": "x"} for doc in (1, "1", "b")])
    options.group_column = "doc"
    assert [record.group for record in read_records(options)] == ["1", "1", "b"]


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ({"doc": None}, "'doc' must be a string or a whole number, got null"),
        ({"doc": 1.5}, "'doc' must be a string or a whole number, got the number 1.5"),
        ({"doc": True}, "'doc' must be a string or a whole number, got true"),
        ({"doc": " "}, "'doc' is empty. Each row names its group"),
        ({"doc": "a\n"}, "'doc' holds a control character ('a\\n')"),
        (
            {},
            "lacks the column 'doc' that data.group_column names. Columns there: 'client', 'text'",
        ),
    ],
)
def test_a_row_without_a_usable_group(tmp_path, doc, expected):
    row = {"client": "a", "text": "x"}
    options = write(tmp_path, row | {"doc": "x"}, row | doc)
    options.group_column = "doc"
    assert problems(options) == [f"line 2: {expected}"]


def test_a_group_column_that_is_nowhere(tmp_path):
    options = write_csv(tmp_path, "client,text,document", "a,x,1")
    options.group_column = "documents"
    assert problems(options) == [
        "no row has the column 'documents' that data.group_column names. "
        "Columns there: 'client', 'text', 'document'. Did you mean 'document'?"
    ]


def test_every_client_gets_its_share():
    records = [row for client in "abcdefgh" for row in rows_of(client, "aabbccddeeffgghh")]
    sides = defaultdict(int)
    for rows in split_clients(records, 0.25).values():
        sides[len(rows.train), len(rows.validation)] += 1
    assert dict(sides) == {(12, 4): 8}

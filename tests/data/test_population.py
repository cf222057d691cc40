"""Which clients of the data take part, with how many rows, and what is said of the others."""

import random

import pytest

from pfl_lm.data.population import capped, read_population
from pfl_lm.errors import DataError
from tests.data.files import problems, write

SIZES = {"a": 2, "b": 5, "c": 9, "d": 20}


def people(folder, sizes=SIZES, seed=0, **settings):
    rows = [{"client": c, "text": f"{c} says {i}"} for c, n in sizes.items() for i in range(n)]
    options = write(folder, *random.Random(seed).sample(rows, len(rows)))
    vars(options).update(settings)
    return options


def refused(options):
    with pytest.raises(DataError) as caught:
        read_population(options)
    return caught.value


def n_train(population):
    return {client: len(rows.train) for client, rows in population.clients.items()}


def test_everybody_takes_part_if_nothing_else_is_said(tmp_path):
    population = read_population(people(tmp_path))
    assert list(population.clients) == ["a", "b", "c", "d"]
    assert (population.held_out, population.small, population.notes) == ({}, {}, [])


def test_clients_with_too_few_rows_are_left_out_and_named(tmp_path):
    population = read_population(people(tmp_path, min_train_samples=6))
    assert list(population.clients) == ["c", "d"]
    assert population.small == {"a": 2, "b": 5}
    assert population.notes == [
        "left out, with fewer than data.min_train_samples: 2 clients ('a', 'b')"
    ]


def test_who_has_just_enough_takes_part(tmp_path):
    assert list(read_population(people(tmp_path, min_train_samples=5)).clients) == ["b", "c", "d"]


def test_who_is_kept_for_later_does_not_go_by_the_alphabet(tmp_path):
    sizes = {f"person-{i}": 3 for i in range(9)}
    later = read_population(people(tmp_path, sizes, holdout_clients=4)).held_out
    assert list(later) == sorted(later)
    assert list(later) not in (sorted(sizes)[:4], sorted(sizes)[-4:])


def test_a_client_that_could_not_take_part_is_left_out_too(tmp_path):
    options = write(
        tmp_path,
        *[{"client": "a", "text": str(i), "side": "train"} for i in range(4)],
        {"client": "a", "text": "x", "side": "validation"},
        {"client": "b", "text": "x", "side": "test"},
        {"client": "c", "text": "x", "side": "train"},
    )
    options.split_column = "side"
    assert problems(options) == ["client 'b': no train rows, only 1 test"]
    options.min_train_samples = 2
    population = read_population(options)
    assert (list(population.clients), population.small) == (["a"], {"b": 0, "c": 1})


def test_somebody_must_be_left(tmp_path):
    error = refused(people(tmp_path, min_train_samples=21))
    assert error.message.endswith("rows.jsonl: none of 4 clients has 21 train rows")
    assert error.hint == "lower data.min_train_samples"


def test_a_cap_keeps_rows_in_their_order_and_those_of_a_smaller_cap(tmp_path):
    whole = read_population(people(tmp_path)).clients["d"]
    before = ()
    for most in (1, 4, 9, 15):
        population = read_population(people(tmp_path, max_train_samples=most))
        kept = population.clients["d"].train
        assert len(kept) == most
        assert {row.content for row in before} <= {row.content for row in kept}
        assert list(kept) == [row for row in whole.train if row in kept]
        assert population.clients["d"].validation == whole.validation
        before = kept
    assert n_train(population) == {"a": 1, "b": 4, "c": 7, "d": 15}
    assert population.capped == 0


def test_what_a_cap_takes_away_is_said(tmp_path):
    population = read_population(people(tmp_path, max_train_samples=5))
    assert n_train(population) == {"a": 1, "b": 4, "c": 5, "d": 5}
    assert population.notes == [
        "2 of 4 clients have more train rows than data.max_train_samples lets in"
    ]


def test_the_order_of_the_file_plays_no_part(tmp_path):
    settings = {"max_train_samples": 3, "holdout_clients": 2}
    found = [read_population(people(tmp_path, seed=seed, **settings)) for seed in (0, 1)]
    held = [
        {c: {row.content for row in rows.train} for c, rows in each.clients.items()}
        for each in found
    ]
    assert held[0] == held[1]
    assert len(held[0]) == 2


def test_equal_rows_are_capped_one_by_one(tmp_path):
    options = write(tmp_path, *[{"client": "a", "text": str(i // 6)} for i in range(12)])
    rows = read_population(options).clients["a"]
    assert len(capped(rows, 4).train) == 4


def test_clients_kept_for_later_are_named_or_chosen(tmp_path):
    population = read_population(people(tmp_path, holdout_clients=["c"], max_train_samples=5))
    assert list(population.clients) == ["a", "b", "d"]
    assert [len(rows.train) for rows in population.held_out.values()] == [5]
    assert population.notes[0] == "kept for later by data.holdout_clients: 1 client ('c')"
    some = [read_population(people(tmp_path, holdout_clients=n)).held_out for n in (1, 2, 3)]
    assert [len(each) for each in some] == [1, 2, 3]
    assert some[0].keys() <= some[1].keys() <= some[2].keys()


def test_who_has_too_little_is_not_kept_for_later(tmp_path):
    population = read_population(people(tmp_path, holdout_clients=1, min_train_samples=6))
    assert population.small.keys() == {"a", "b"}
    assert len(population.held_out) == len(population.clients) == 1


@pytest.mark.parametrize("asked", [4, 9, ["a", "b", "c", "d"]])
def test_not_all_can_be_kept_for_later(tmp_path, asked):
    expected = "data.holdout_clients keeps all 4 clients for later"
    assert expected in refused(people(tmp_path, holdout_clients=asked)).message


def test_who_is_kept_for_later_must_be_there(tmp_path):
    sizes = {f"person-{i}": 3 for i in range(7)}
    error = refused(people(tmp_path, sizes, holdout_clients=["person-1", "persn-2", "x"]))
    there = (
        "of those there are 7 clients "
        "('person-0', 'person-1', 'person-2', 'person-3', 'person-4', …)"
    )
    assert error.message.splitlines()[1:] == [
        f"  there is no client 'persn-2' to hold out; {there}. Did you mean 'person-2'?",
        f"  there is no client 'x' to hold out; {there}",
    ]

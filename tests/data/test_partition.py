"""Clients made out of rows: who gets what, by closed forms and by what must not matter."""

import random
from collections import Counter, defaultdict

import numpy
import pytest

from pfl_lm.data.content import PromptCompletion, Text
from pfl_lm.data.partition import partitioned
from pfl_lm.data.records import Record
from pfl_lm.data.sources import read_records
from pfl_lm.errors import DataError
from pfl_lm.recipe.partition import PartitionOptions
from tests.data.files import problems, write

LABELS = "abcd"


def rows(n, split="train", labels=LABELS, group=None):
    return [
        Record(
            client="",
            split=split,
            content=PromptCompletion(f"{split} {i}", "x"),
            line=i,
            group=None if group is None else f"{group}{i // 3}",
            label=labels[i % len(labels)],
        )
        for i in range(n)
    ]


def deal(records, **options):
    return partitioned("rows", records, PartitionOptions(**options))


def sizes(records, split="train"):
    return Counter(record.client for record in records if record.split == split)


def contents(records):
    held = defaultdict(set)
    for record in records:
        held[record.client].add(record.content)
    return held


WAYS = {
    "natural_id": {"name": "natural_id", "partition_by": "topic"},
    "iid": {"name": "iid", "num_partitions": 5},
    "dirichlet": {"name": "dirichlet", "num_partitions": 5, "partition_by": "x", "alpha": 1.0},
    "shards": {
        "name": "shards",
        "num_partitions": 5,
        "partition_by": "x",
        "num_shards_per_partition": 2,
    },
    "by_size": {"name": "by_size", "partition_sizes": [5, 4, 3, 2, 1]},
}
BY_CHANCE = [way for way in WAYS if way != "natural_id"]


@pytest.mark.parametrize("way", WAYS)
def test_every_row_goes_to_one_client_and_keeps_its_place(way):
    records = rows(120) + rows(40, "validation") + rows(40, "test")
    found = deal(records, **WAYS[way])
    assert [(r.content, r.split, r.line) for r in found] == [
        (r.content, r.split, r.line) for r in records
    ]
    assert len(sizes(found)) == (4 if way == "natural_id" else 5)


@pytest.mark.parametrize("way", BY_CHANCE)
def test_the_order_of_the_file_plays_no_part(way):
    records = rows(120) + rows(40, "test")
    shuffled = random.Random(1).sample(records, len(records))
    assert contents(deal(records, **WAYS[way])) == contents(deal(shuffled, **WAYS[way]))


@pytest.mark.parametrize("way", BY_CHANCE)
def test_the_seed_decides(way):
    records = rows(120)
    one, same, other = (contents(deal(records, **WAYS[way], seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_the_seed_decides_who_gets_which_values_too():
    def values(way, seed):
        found = deal(rows(120), **WAYS[way], seed=seed)
        return Counter((record.client, record.label) for record in found)

    for way in ("dirichlet", "shards"):
        assert values(way, 1) == values(way, 1)
        assert values(way, 1) != values(way, 2)


@pytest.mark.parametrize("way", BY_CHANCE)
def test_rows_of_a_group_stay_together(way):
    found = deal(rows(120, labels="aaabbb", group="doc"), **WAYS[way])
    owners = defaultdict(set)
    for record in found:
        owners[record.group].add(record.client)
    assert len(owners) == 40
    assert all(len(clients) == 1 for clients in owners.values())


def test_values_of_several_columns_make_a_client(tmp_path):
    options = write(
        tmp_path,
        {"text": "x", "language": "fr", "topic": 1},
        {"text": "y", "language": "en", "topic": 1},
    )
    options.partition = PartitionOptions(name="natural_id", partition_by=["language", "topic"])
    assert [record.client for record in read_records(options)] == ["fr:1", "en:1"]


def test_iid_clients_are_of_one_size():
    found = deal(rows(123) + rows(12, "test"), name="iid", num_partitions=10)
    assert set(sizes(found).values()) == {12, 13}
    assert set(sizes(found, "test").values()) == {1, 2}
    assert sorted(sizes(found)) == [f"client-{i}" for i in range(10)]


def test_ids_have_as_many_digits_as_the_last_one():
    found = deal(rows(123), name="iid", num_partitions=11)
    assert min(sizes(found)) == "client-00"


def test_sizes_are_proportions():
    found = deal(rows(120) + rows(12, "test"), name="by_size", partition_sizes=[30, 20, 10])
    expected = {"client-0": 60, "client-1": 40, "client-2": 20}
    assert sizes(found) == expected
    assert sizes(found, "test") == {client: n // 10 for client, n in expected.items()}


def test_shards_give_few_values_each():
    found = deal(
        rows(120) + rows(40, "test"),
        **WAYS["shards"] | {"num_partitions": 6, "num_shards_per_partition": 2},
    )
    values = defaultdict(set)
    for record in found:
        values[record.client].add(record.label)
    assert set(sizes(found).values()) == {20}
    assert max(map(len, values.values())) == 2  # 12 pieces of 4 values: none has two


def test_a_client_is_tested_on_the_values_it_learns():
    found = deal(rows(1200) + rows(400, "test"), **WAYS["dirichlet"] | {"alpha": 0.3})
    shares = {
        split: Counter((r.client, r.label) for r in found if r.split == split)
        for split in ("train", "test")
    }
    for pair, n in shares["train"].items():
        assert abs(shares["test"][pair] - n / 3) <= 1


def test_shares_have_the_mean_and_variance_of_the_dirichlet_distribution():
    n, alpha, n_values, each = 5, 0.7, 300, 400
    labels = [f"{i:03}" for i in range(n_values)]
    found = deal(
        rows(n_values * each, labels=labels),
        name="dirichlet",
        num_partitions=n,
        partition_by="x",
        alpha=alpha,
        min_partition_size=1,
    )
    counted = Counter((record.label, record.client) for record in found)
    drawn = numpy.array([[counted[v, f"client-{c}"] for c in range(n)] for v in labels]) / each
    variance = (1 / n) * (1 - 1 / n) / (n * alpha + 1)
    assert drawn.mean(axis=0) == pytest.approx(1 / n, abs=4 * (variance / n_values) ** 0.5)
    assert drawn.var(axis=0) == pytest.approx(variance, rel=0.25)


def test_a_large_alpha_makes_clients_alike_and_a_small_one_makes_them_differ():
    def most(alpha):
        found = deal(rows(4000), **WAYS["dirichlet"] | {"alpha": alpha, "min_partition_size": 1})
        counted = Counter((record.label, record.client) for record in found)
        return max(counted.values()) / 1000

    assert most(1e5) == pytest.approx(0.2, abs=0.01)
    assert most(0.01) > 0.9


def test_draws_are_made_again_until_every_client_has_enough():
    way = WAYS["dirichlet"] | {"alpha": 0.5, "num_partitions": 8}
    tries = [min(sizes(deal(rows(160), **way, seed=s)).values()) for s in range(12)]
    assert min(tries) >= 2
    with pytest.raises(DataError) as caught:
        deal(rows(160), **way, min_partition_size=20)
    assert "10 draws" in caught.value.message
    assert caught.value.hint.startswith("data.partition: raise alpha")


@pytest.mark.parametrize(
    ("way", "pieces"), [("iid", 5), ("shards", 10), ("by_size", 5), ("dirichlet", 5)]
)
def test_there_must_be_a_row_for_each_piece(way, pieces):
    with pytest.raises(DataError) as caught:
        deal(rows(pieces - 1) + rows(9, "test"), **WAYS[way])
    assert caught.value.message == f"rows: {pieces - 1} train rows cannot make {pieces} pieces"


def test_what_rows_are_told_apart_by_must_be_there(tmp_path):
    options = write(tmp_path, {"text": "x"}, {"text": "y"})
    options.partition = PartitionOptions(name="natural_id", partition_by="topic")
    assert problems(options) == [
        "no row has the column 'topic' that data.partition.partition_by names. "
        "Columns there: 'text'"
    ]


def test_a_folder_has_its_clients_already(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    options = write(tmp_path)
    options.path = str(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    options.partition = PartitionOptions(name="iid", num_partitions=1)
    with pytest.raises(DataError, match="a folder has a file for each client already"):
        read_records(options)


def test_a_client_column_is_just_a_column(tmp_path):
    options = write(tmp_path, *[{"client": i % 2, "text": str(i)} for i in range(4)])
    options.partition = PartitionOptions(name="iid", num_partitions=1)
    found = read_records(options)
    assert {record.client for record in found} == {"client-0"}
    assert found[0].content == Text("0")

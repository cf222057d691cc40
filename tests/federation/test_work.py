"""What a task is expected to be, by hand, and who comes first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pfl_lm.data.examples import Example
from pfl_lm.federation.fleet.work import expected_work, longest_first
from tests.world import options


def rows(*lengths: int) -> tuple[Example, ...]:
    return tuple(Example(tuple(range(n)), ((1, n),)) for n in lengths)


TRAIN = {"few": rows(10, 20), "many": rows(10, 20, 10, 20), "short": rows(4, 4, 4, 4)}
HELD = {"few": rows(5), "many": rows(3, 3), "short": rows(8, 8)}
TEST = {"few": 3, "many": 0, "short": 1}


class Data:
    def train(self, client: str) -> tuple[Example, ...]:
        return TRAIN[client]

    def validation(self, client: str) -> tuple[Example, ...]:
        return HELD[client]

    def __getitem__(self, client: str) -> Any:
        return SimpleNamespace(test_rows=[None] * TEST[client])


def side(fits: int = 1, **training: Any) -> Any:
    method = SimpleNamespace(fits=fits)
    return SimpleNamespace(dataset=Data(), training=options(**training), method=method)


@pytest.mark.parametrize(
    ("client", "training", "tokens"),
    [
        ("few", {"max_steps": 3, "per_device_train_batch_size": 2}, 3 * 2 * 15),
        ("few", {"max_steps": 3, "per_device_train_batch_size": 8}, 3 * 2 * 15),  # has no more
        ("many", {"max_steps": 3, "per_device_train_batch_size": 8}, 3 * 4 * 15),
        ("many", {"max_steps": 3, "gradient_accumulation_steps": 2}, 3 * 2 * 2 * 15),
        ("many", {"max_steps": None, "local_epochs": 2}, 4 * 2 * 15),
        ("short", {"max_steps": 3}, 3 * 2 * 4),
    ],
)
def test_a_turn_is_its_steps_tokens(client: str, training: dict[str, Any], tokens: int) -> None:
    assert expected_work(side(**training), "train", client) == 3 * tokens
    assert expected_work(side(2, **training), "train", client) == 2 * 3 * tokens


def test_a_scoring_is_its_rows() -> None:
    assert [expected_work(side(), "evaluate", client) for client in HELD] == [5, 6, 16]
    assert [expected_work(side(), "finish", client) for client in HELD] == [20, 6, 24]


def test_the_longest_come_first_and_equal_ones_as_they_are() -> None:
    epochs = side(max_steps=None, local_epochs=1)
    assert longest_first(epochs, "train", ["few", "short", "many"]) == ["many", "few", "short"]
    assert longest_first(side(), "train", ["short", "many", "few"]) == ["many", "few", "short"]
    assert longest_first(side(), "train", ["short", "few", "many"]) == ["few", "many", "short"]

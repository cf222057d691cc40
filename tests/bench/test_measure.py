"""In which order ways are measured, and what of each counts, by a clock that the test winds on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pfl_lm.bench.case import Case, Did
from pfl_lm.bench.clock import Stopwatch
from pfl_lm.bench.measure import measure
from pfl_lm.bench.results import Bench
from pfl_lm.bench.ways import Way
from tests.bench.cases import tiny_case

REPEATS = 3
STEPS = 2


class Clock:
    """Stands at what it was wound on to; the wall's hand and the processor's are moved apart."""

    def __init__(self) -> None:
        self.wall, self.cpu = 1000.0, 500.0

    def now(self, device: torch.device | None = None) -> tuple[float, float]:
        return self.wall, self.cpu

    def wind(self, wall: float, cpu: float) -> None:
        self.wall += wall
        self.cpu += cpu


class Ways:
    """Two ways that take as long as they are told, and note what is done with them."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.done: list[str] = []

    def way(self, name: str, factor: float) -> Way:
        @contextmanager
        def opened(case: Case, steps: Stopwatch) -> Iterator[Callable[[], Did]]:
            self.clock.wind(100, 90)  # preparing

            def turn() -> Did:
                self.done.append(name)
                n = self.done.count(name)  # each time longer than the last
                self.clock.wind(factor * n, factor * n / 4)
                for _ in range(STEPS):
                    steps.start()
                    self.clock.wind(8 * factor * n, 3 * factor * n)
                    steps.stop()
                return Did()

            yield turn
            self.clock.wind(100, 90)  # tidying up

        return Way(name, opened)


class Product:
    """A matrix product of 1000 operations that takes longer from time to time."""

    side = 7

    def __init__(self, *given: Any) -> None:
        self.n = 0

    def measured(self) -> tuple[float, float, int]:
        self.n += 1
        return 10.0 * self.n, 2.0 * self.n, 1000


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bench, Ways, Case]:
    clock, case = Clock(), tiny_case(tmp_path)
    for module in ("clock", "measure"):
        monkeypatch.setattr(f"pfl_lm.bench.{module}.now", clock.now)
    monkeypatch.setattr("pfl_lm.bench.measure.Multiplication", Product)
    ways = Ways(clock)
    return measure(case, [ways.way("a", 1), ways.way("b", 2)], repeats=REPEATS), ways, case


def test_ways_take_turns(measured: tuple[Bench, Ways, Case]) -> None:
    """So that what else the machine does falls on all of them."""
    assert measured[1].done == ["a", "b"] * (REPEATS + 1)


@pytest.mark.parametrize(("name", "factor"), [("a", 1.0), ("b", 2.0)])
def test_what_is_prepared_and_the_first_turn_do_not_count(
    measured: tuple[Bench, Ways, Case], name: str, factor: float
) -> None:
    way = measured[0].ways[name]
    counted = [1e3 * factor * n for n in (2, 3, 4)]
    assert way.turn.wall == pytest.approx([17 * each for each in counted])
    assert way.turn.cpu == pytest.approx([6.25 * each for each in counted])
    assert way.step.wall == pytest.approx([8 * each for each in counted])
    assert way.step.cpu == pytest.approx([3 * each for each in counted])
    assert way.fixed.wall == pytest.approx(counted)
    assert way.fixed.cpu == pytest.approx([each / 4 for each in counted])
    assert way.n_steps == STEPS


def test_the_machines_rate_is_the_median_by_the_same_clock(
    measured: tuple[Bench, Ways, Case],
) -> None:
    found = measured[0]
    assert found.by == "cpu"
    rates = sorted(1000 / (2.0 * n) for n in range(1, REPEATS + 2))
    assert found.rate == pytest.approx((rates[1] + rates[2]) / 2)


def test_tokens_are_those_of_rows_and_not_of_padding(measured: tuple[Bench, Ways, Case]) -> None:
    found, _, case = measured
    batches = list(case.batches())
    padded = sum(batch["input_ids"].numel() for batch in batches)
    rows = {example.input_ids for example in case.examples}
    shown = [
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert set(shown) <= rows
    assert found.n_tokens == sum(map(len, shown)) < padded

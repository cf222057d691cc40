"""From when to when the memory of a way is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pfl_lm.bench import case as cases
from pfl_lm.bench import machine, memory
from pfl_lm.bench import ways as all_ways
from pfl_lm.bench.case import Case, Did
from pfl_lm.bench.clock import Stopwatch
from pfl_lm.bench.ways import AGAINST, Way
from tests.tiny import tiny_recipe


def test_the_peak_is_that_of_two_turns_once_all_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    load = cases.load_case

    def loaded(*given: Any, **more: Any) -> Case:
        case = load(*given, **more)
        done.append("loaded")
        return case

    @contextmanager
    def opened(case: Case, steps: Stopwatch) -> Iterator[Callable[[], Did]]:
        def turn() -> Did:
            done.append("turn")
            return Did()

        yield turn

    def peak(device: Any) -> int:
        done.append("looked at")
        return 7

    monkeypatch.setattr(cases, "load_case", loaded)
    monkeypatch.setattr(machine, "forget_peak", lambda device: done.append("forgotten"))
    monkeypatch.setattr(machine, "peak_bytes", peak)
    monkeypatch.setattr(all_ways, "asked_ways", lambda *given: [Way("mine", opened)])

    assert memory._peak(tiny_recipe(tmp_path), [], "mine", tmp_path, list(AGAINST), 1, 1) == 7
    assert done == ["loaded", "forgotten", "turn", "turn", "looked at"]

"""Clocks, and what is reckoned from them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pfl_lm.bench.clock import Stopwatch, Times, alternate, now
from pfl_lm.bench.measure import clock_to_go_by, measure
from pfl_lm.bench.results import Bench, Result
from pfl_lm.bench.turns import Steps
from pfl_lm.bench.ways import FIT, SAME_LOOP
from tests.bench.cases import TOP, tiny_case, ways


def test_the_wall_goes_on_while_the_processor_rests() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        watch.start()
        time.sleep(0.05)
        watch.stop()
    assert watch.laps == 2
    assert watch.wall >= 0.1 > 5 * watch.cpu
    watch.reset()
    assert (watch.wall, watch.cpu, watch.laps) == (0, 0, 0)
    wall, cpu = now()
    assert wall != cpu


def test_the_first_time_of_each_does_not_count() -> None:
    done: list[str] = []
    times = alternate({"a": lambda: done.append("a"), "b": lambda: done.append("b")}, 2)
    assert done == ["a", "b"] * 3
    assert [len(each.wall) for each in times.values()] == [2, 2]


def test_a_step_is_timed_from_its_first_micro_batch_to_its_last() -> None:
    watch, trainer = Stopwatch(), SimpleNamespace(global_step=0)
    told: Any = (trainer, None)
    steps = Steps(watch)
    steps.on_train_start(*told)
    for step in (1, 2):
        for part in (1, 2):
            steps.on_train_batch_start(*told)
            time.sleep(0.02)
            trainer.global_step += part == 2
            steps.on_train_batch_end(*told)
        assert watch.laps == step
    assert watch.wall >= 0.08


def test_times_are_summed_up_by_their_medians() -> None:
    times = Times()
    for wall, cpu in [(0.003, 0.001), (0.001, 0.0005), (0.01, 0.002)]:
        times.add(wall, cpu)
    assert times.numbers == pytest.approx(
        {
            **{"wall_median": 3, "wall_least": 1, "wall_most": 10},
            **{"cpu_median": 1, "cpu_least": 0.5, "cpu_most": 2, "times": 3},
        }
    )


def test_ratios_go_by_the_processor_only_where_one_thread_does_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert clock_to_go_by(torch.device("cpu")) == "cpu"
    assert clock_to_go_by(torch.device("cuda")) == "wall"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clock_to_go_by(torch.device("cpu")) == "wall"


def test_what_follows_from_the_times() -> None:
    quick, slow = Result(flops=100), Result(flops=300)
    quick.turn.add(wall=4, cpu=1)
    slow.turn.add(wall=8, cpu=3)
    found = Bench(
        "cpu", rate=200, n_tokens=16, same_bits=None, ways={"a": quick, "b": slow}, about={}
    )
    assert found.ratio("b", "a") == 3
    assert found.ratio("b", "a", "wall") == 2
    assert found.share("a") == found.share("b") == 0.5
    assert found.turns_per_hour("b") == 450
    assert found.tokens_per_second("a") == 4


def test_a_turn_is_its_steps_and_the_rest(tmp_path: Path) -> None:
    case = tiny_case(tmp_path, **TOP, **{"method": {"name": "ditto"}})
    found = measure(case, list(ways(case).values()), repeats=1)
    for name, way in found.ways.items():
        fits = 2 if name.startswith("pfl-lm") else 1
        assert way.n_steps == 2 * fits
        [turn], [step], [fixed] = way.turn.wall, way.step.wall, way.fixed.wall
        assert turn == pytest.approx(way.n_steps * step + fixed)
    assert found.ways["pfl-lm"].flops == 2 * found.ways["fit"].flops
    assert found.same_bits is True


def test_a_loop_that_ends_at_other_bits_is_told(tmp_path: Path) -> None:
    case = tiny_case(tmp_path, **TOP)
    known = ways(case)
    other = replace(known["loop"], name=SAME_LOOP)  # its loss is summed in another order
    assert measure(case, [known[FIT], other], repeats=1).same_bits is False
    assert measure(case, [known[FIT]], repeats=1).same_bits is None

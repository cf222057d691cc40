"""Signals: the first lets the step in progress end, the second stops at once, and both are safe."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pfl_lm.cli.app import app
from pfl_lm.cli.interrupts import Interrupted, Interrupts
from pfl_lm.federation.client import ClientSide
from tests.same import check_same
from tests.tiny import tiny_recipe

BOTH = (signal.SIGINT, signal.SIGTERM)


def get(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_waits_for_the_step_and_the_second_does_not(number: signal.Signals) -> None:
    said: list[str] = []
    with Interrupts(said.append) as interrupts:
        interrupts.patient = True
        get(number)
        assert said == ["stopping after this step; once more to stop at once"]
        with pytest.raises(Interrupted, match=number.name):
            interrupts.check()
    with Interrupts(said.append) as interrupts:
        interrupts.patient = True
        interrupts.check()
        get(number)
        with pytest.raises(Interrupted, match="SIGTERM"):
            get(signal.SIGTERM)
        get(number)  # what is put away now is put away in peace


def test_where_no_step_will_come_the_first_stops_at_once() -> None:
    with Interrupts() as interrupts:
        assert not interrupts.patient
        with pytest.raises(Interrupted):
            get(signal.SIGINT)


def test_signals_are_given_back() -> None:
    before = [signal.getsignal(number) for number in BOTH]
    with Interrupts() as interrupts:
        interrupts.patient = True
        get(signal.SIGTERM)
    assert [signal.getsignal(number) for number in BOTH] == before


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("expected")
    assert cli("finetune", str(tiny_recipe(place))) == (0, "")
    return place / "runs" / "tiny"


def cli(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*arguments])
    return result.exit_code, result.stderr


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", ["_train", "_evaluate", "_finish"])
def test_a_run_goes_on_where_a_signal_has_stopped_it(
    tmp_path: Path, expected: Path, monkeypatch: pytest.MonkeyPatch, name: str, times: int
) -> None:
    """In carol's turn or scoring, once the display counts steps and rows."""
    task, recipe = getattr(ClientSide, name), str(tiny_recipe(tmp_path))

    def signalled(self: ClientSide, given: Any) -> Any:
        if given.client == "carol":
            for _ in range(times):
                get(signal.SIGTERM)
        return task(self, given)

    with monkeypatch.context() as patch:
        patch.setattr(ClientSide, name, signalled)
        assert cli("finetune", recipe) == (130, "interrupted\n")
    assert cli("finetune", recipe, "--resume") == (0, "")
    check_same(tmp_path / "runs" / "tiny", expected)

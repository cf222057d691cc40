"""Two ranks of which one is killed: one process goes on with their run, to the same bytes."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pfl_lm.cli.app import app
from tests.federation.test_ranks import RUNS, by_hand, end_of
from tests.same import check_same
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.slow

CHANGES: dict[str, Any] = {"federation.rounds": 3, "adapter.lora_dropout": 0.2}


def cli(*arguments: str) -> None:
    result = CliRunner().invoke(app, [*arguments])
    assert (result.exit_code, result.stderr) == (0, "")


TOGETHER = {**CHANGES, "runtime.parallel": "data"}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("expected")
    cli("finetune", str(tiny_recipe(place, **CHANGES)))
    return place / "runs" / "tiny"


@pytest.mark.parametrize(("rank", "client"), [(0, "bob"), (1, "carol")])
def test_a_rank_that_dies_in_a_turn(tmp_path: Path, expected: Path, rank: int, client: str) -> None:
    recipe = tiny_recipe(tmp_path, **CHANGES)
    ended = [end_of(process) for process in by_hand(*RUNS, "--dying", client, str(recipe))]
    assert ended[rank][0] == -signal.SIGKILL
    assert ended[1 - rank][0] == 2
    cli("finetune", str(recipe), "--resume")
    check_same(tmp_path / "runs" / "tiny", expected, apart=("federation.lock",))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_a_rank_that_is_killed_at_any_moment(
    tmp_path: Path, expected: Path, rank: int, seed: int
) -> None:
    """Some time after round 0, be it in a turn, between turns or while rank 0 exports."""
    recipe = tiny_recipe(tmp_path, **CHANGES)
    ranks = by_hand(*RUNS, str(recipe))
    while ranks[0].stdout is not None and "round 0/3" not in ranks[0].stdout.readline():
        assert ranks[0].poll() is None
    time.sleep(random.Random(seed).uniform(0, 2))
    ranks[rank].kill()
    codes = [end_of(process)[0] for process in ranks]
    assert codes[rank] in (-signal.SIGKILL, 0)
    cli("finetune", str(recipe), "--resume")
    check_same(tmp_path / "runs" / "tiny", expected, apart=("federation.lock",))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run it with two ranks that share every turn."""
    place = tmp_path_factory.mktemp("together")
    ended = [end_of(each) for each in by_hand(*RUNS, str(tiny_recipe(place, **TOGETHER)))]
    assert [code for code, _, _ in ended] == [0, 0]
    return place / "runs" / "tiny"


@pytest.mark.parametrize("how", ["--dying", "--dying-in-a-step"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_in_a_turn_of_all(
    tmp_path: Path, together: Path, how: str, rank: int
) -> None:
    recipe = str(tiny_recipe(tmp_path, **TOGETHER))
    ended = [end_of(each) for each in by_hand(*RUNS, how, f"bob@{rank}", recipe)]
    assert ended[rank][0] == -signal.SIGKILL
    assert ended[1 - rank][0] == 2
    if rank:
        assert ended[0][2].startswith("another rank has ended before its time")
    again = [end_of(each) for each in by_hand(*RUNS, "--resume", "yes", recipe)]
    assert [code for code, _, _ in again] == [0, 0]
    check_same(tmp_path / "runs" / "tiny", together, apart=("federation.lock",))


def test_what_ranks_began_together_one_process_ends(tmp_path: Path, together: Path) -> None:
    recipe = tiny_recipe(tmp_path, **TOGETHER)
    for each in by_hand(*RUNS, "--dying", "bob@1", str(recipe)):
        end_of(each)
    result = CliRunner().invoke(app, ["finetune", str(recipe), "runtime.parallel=auto", "--resume"])
    assert result.exit_code == 0, result.stderr
    said = "not as when the run began: parallel clients (then data on 2 ranks); last digits"
    assert said in " ".join(result.stdout.split())


def test_a_rank_that_does_not_answer_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    recipe = str(tiny_recipe(tmp_path, **TOGETHER))
    ranks = by_hand(*RUNS, "--patience", "5", "--mute", "bob@1", recipe)
    code, _, said = end_of(ranks[0])
    ranks[1].kill()
    end_of(ranks[1])
    assert code == 2
    assert said == (
        "another rank does not answer\n"
        "  hint: see whether its machine or its process hangs; then end all ranks and resume"
    )


@pytest.mark.parametrize("parallel", ["clients", "data"])
def test_ctrl_c_on_rank_0_alone_ends_both(tmp_path: Path, parallel: str) -> None:
    more = {"runtime.parallel": parallel, "federation.rounds": 200}
    ranks = by_hand(*RUNS, str(tiny_recipe(tmp_path, **{**CHANGES, **more})))
    while ranks[0].stdout is not None and "round 1/200" not in ranks[0].stdout.readline():
        assert ranks[0].poll() is None
    ranks[0].send_signal(signal.SIGINT)
    codes = [end_of(process)[0] for process in ranks]
    assert codes[0] == 130
    assert codes[1] == 2

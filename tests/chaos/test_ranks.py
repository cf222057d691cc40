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


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("expected")
    cli("finetune", str(tiny_recipe(place, **CHANGES)))
    return place / "runs" / "tiny"


@pytest.mark.parametrize(("rank", "client"), [(0, "alice"), (1, "bob")])
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

"""Kill a run wherever it is and go on with it: it ends as one that nobody disturbed.

What is killed and compared is told in `tests.chaos.forks`, which is started here as a program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.disks import Ext4, NoDiskError

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="takes Linux")


def chaos(place: Path, *arguments: str) -> dict[str, Any]:
    """Start it; return what it tells. Its seed is drawn unless PFL_LM_CHAOS_SEED gives one."""
    if seed := os.environ.get("PFL_LM_CHAOS_SEED"):
        arguments = (*arguments, "--seed", seed)
    command = [sys.executable, "-m", "tests.chaos.forks", "--folder", str(place), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    print(done.stdout)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_five_kills(tmp_path: Path) -> None:
    told = chaos(tmp_path, "--kills", "5", "--variants", "2")
    assert told["kills"] == 5


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    told = chaos(tmp_path, "--kills", "200")
    assert told["kills"] == 200
    assert len(told["variants"]) == 8
    where = {each for places in told["where"] for each in places.split("/")}
    assert {"training", "writing", "committing", "exporting"} <= where


@pytest.mark.slow
def test_fifty_power_cuts(tmp_path: Path) -> None:
    """Of what was not synced nothing is left; of what was committed, everything."""
    try:
        Ext4(tmp_path).unmount()
    except NoDiskError as error:
        pytest.skip(str(error))
    (tmp_path / "cuts").mkdir()
    assert chaos(tmp_path / "cuts", "--kills", "50", "--power-cuts")["kills"] == 50

"""Runs that diverge or are interrupted: what is said, and what is kept."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pfl_lm.federation.faults import TooFewClientsError
from tests.runs import CLIENTS, ask, environment, pfl_lm_command, refused, scored
from tests.same import files_in
from tests.tiny import tiny_recipe


@pytest.mark.parametrize("method", ["fedavg", "local"])
def test_a_run_that_diverges_says_so(tmp_path: Path, method: str) -> None:
    changes = {"training.learning_rate": 1e38, "method.name": method}
    error = refused(tmp_path, TooFewClientsError, **changes)
    few = "0 of 3 clients came through, federation.min_clients is 1: 3 problems"
    assert error.message.startswith(f"round 1: {few}\n  alice: its state holds NaN or infinity: ")
    lower = "lower training.learning_rate (now 1e+38), in a new run"
    assert error.hint == f"training has diverged: {lower}"
    assert scored(tmp_path / "runs" / "tiny") == []


@pytest.fixture
def interrupted(tmp_path: Path) -> Iterator[Callable[[str], tuple[int, str, str]]]:
    """Start a long run in a process of its own and stop it once a line has been printed."""
    started: list[subprocess.Popen[str]] = []

    def stop_after(line: str) -> tuple[int, str, str]:
        recipe = tiny_recipe(tmp_path, **{"federation.rounds": 1000})
        process = subprocess.Popen(
            pfl_lm_command("finetune", str(recipe)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(PYTHONUNBUFFERED="1"),
            cwd=tmp_path,
        )
        started.append(process)
        assert process.stdout is not None
        seen = []
        for text in process.stdout:
            seen.append(text)
            if text.startswith(line):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
        return process.returncode, "".join([*seen, out]), err

    yield stop_after
    for process in started:
        process.kill()
        process.wait()


def test_an_interrupted_run_ends_with_130_and_its_scores(
    tmp_path: Path, interrupted: Callable[[str], tuple[int, str, str]]
) -> None:
    code, out, err = interrupted("round 0")

    folder = tmp_path / "runs" / "tiny"
    assert (code, err) == (130, "interrupted\n")
    assert "Traceback" not in out
    *_, before_last, last = out.splitlines()
    assert before_last == "stopping after this step; once more to stop at once"
    assert last == f"stopped; to go on: pfl-lm resume {folder}"
    rows = scored(folder)
    first = [(row["round"], row["client"], row["candidate"]) for row in rows[:3]]
    assert first == [("0", client, "base") for client in CLIENTS]
    assert rows == [
        {
            "round": str(r),
            "client": c,
            "split": s,
            "candidate": k,
            "metric": "nll",
            "value": repr(v),
        }
        for r, c, s, k, v in ask(
            folder,
            "SELECT round, client, split, candidate, nll FROM scores ORDER BY 1, 2, 3, 4",
        )
    ]
    assert not [name for name in files_in(folder) if name.endswith((".part", "-wal", "-shm"))]
    assert not (folder / "adapters").exists()

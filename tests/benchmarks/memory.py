"""How much memory a run takes, and that more clients take no more of it.

    python -m tests.benchmarks.memory [--tiny]

Runs one federation of 3 clients and one of 48, each in a process of its own, one round of one step;
prints the most memory each has held (peak resident set size), and what it held before the run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.measure import arguments, show

FEW, MANY = 3, 48


def peak() -> float:
    """Return the most memory this process has held, in MB."""
    import torch

    from pfl_lm.bench.machine import peak_bytes

    return peak_bytes(torch.device("cpu")) / 2**20


def run_here(n_clients: int, *, tiny: bool) -> dict[str, float]:
    """Run a federation in this process; return what it held with the libraries, and in all."""
    from pfl_lm.finetune import finetune
    from tests.benchmarks.world import recipe

    if tiny:
        from tests.tiny import tiny_model

        tiny_model()
    import peft  # noqa: F401  what is imported while a run begins is none of its clients

    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        changes = {"federation.rounds": 1}
        finetune(recipe(Path(folder), tiny=tiny, n_clients=n_clients, **changes))
    return {"before": before, "peak": peak()}


def run_apart(n_clients: int, *, tiny: bool) -> dict[str, float]:
    """Run a federation in a process of its own."""
    code = (
        "import json; from tests.benchmarks.memory import run_here; "
        f"print('\\n' + json.dumps(run_here({n_clients}, tiny={tiny})))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    given = arguments(__doc__, repeats=1)
    found = {n: run_apart(n, tiny=given.tiny) for n in (FEW, MANY)}
    rows: list[list[object]] = [["MB", "libraries alone", "peak of the run"]]
    rows += [[f"{n} clients", each["before"], each["peak"]] for n, each in found.items()]
    show("memory", rows, {"megabytes": {str(n): each for n, each in found.items()}})


if __name__ == "__main__":
    main()

"""What the tests start on every rank: the command line, once for each recipe.

python -m tests.federation.rank_runs [--failing CLIENT | --faulty CLIENT | --dying CLIENT] RECIPE...
"""

from __future__ import annotations

import os
import signal
import sys

from pfl_lm.cli.app import main
from pfl_lm.errors import DivergedError
from pfl_lm.federation import noise
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.messages import Assignment, Update


def spoil(how: str, client: str) -> None:
    """Let a client's turns or its scoring fail, or end the process that its turn is on."""
    name = "_evaluate" if how == "--failing" else "_train"
    plain = getattr(ClientSide, name)

    def spoiled(self: ClientSide, task: Assignment) -> Update:
        if task.client != client or not task.round:
            return plain(self, task)
        if how == "--dying":
            os.kill(os.getpid(), signal.SIGKILL)
        raise DivergedError(f"client {client!r} on rank {os.environ['RANK']}", hint="lower it")

    setattr(ClientSide, name, spoiled)


def same_secret(bits: int) -> int:
    """Stand in for the draw of a run's secret, so that two runs have the same noise."""
    return 2**bits // 3


if __name__ == "__main__":
    noise.secrets.randbits = same_secret
    given = sys.argv[1:]
    while given:
        if given[0].startswith("--"):
            spoil(given.pop(0), given.pop(0))
        sys.argv = ["pfl-lm", "finetune", given.pop(0)]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise

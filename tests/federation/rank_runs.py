"""What the tests start on every rank: the command line, once for each recipe.

python -m tests.federation.rank_runs [WHAT WHO] [--resume yes] RECIPE...

WHAT goes wrong from there on: see `spoil` and `prepare`. WHO is a client, or CLIENT@RANK for one
rank alone where ranks take a turn together.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

from pfl_lm.cli.app import main
from pfl_lm.errors import DivergedError
from pfl_lm.federation import noise
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.fleet import links
from pfl_lm.federation.messages import Assignment, Update
from pfl_lm.train.module import PersonalizedLM

RANK = os.environ.get("RANK", "0")


def spoil(how: str, who: str) -> None:
    """Let a client's turns or its scoring go wrong, in one of the ways below."""
    client, _, rank = who.partition("@")
    if rank not in ("", RANK):
        return
    name = "_evaluate" if how == "--failing" else "_train"
    plain = getattr(ClientSide, name)

    def spoiled(self: ClientSide, task: Assignment) -> Update:
        if task.client != client or not task.round:
            return plain(self, task)
        match how:
            case "--dying":
                os.kill(os.getpid(), signal.SIGKILL)
            case "--mute":
                time.sleep(3600)
            case "--lean" if not task.halved:
                raise MemoryError
            case "--lean":
                return plain(self, task)
            case "--apart":
                run = self.local_run

                def nudged(*given: Any, **more: Any) -> Any:
                    trainer = run(*given, **more)
                    train = trainer.train
                    trainer.train = lambda *a, **m: train(*a, **m) + 1e-6  # type: ignore[method-assign]
                    return trainer

                self.local_run = nudged  # type: ignore[method-assign]
                return plain(self, task)
        raise DivergedError(f"client {client!r} on rank {os.environ['RANK']}", hint="lower it")

    setattr(ClientSide, name, spoiled)


def die_in_a_step(who: str) -> None:
    """End a rank's process once it has gone backward, in the second step of a client's turn."""
    client, _, rank = who.partition("@")
    plain_train, plain_backward = ClientSide._train, PersonalizedLM.on_after_backward
    steps: list[str] = []
    now = ""

    def train(self: ClientSide, task: Assignment) -> Update:
        nonlocal now
        now = task.client
        return plain_train(self, task)

    def backward(self: PersonalizedLM) -> None:
        steps.append(now)
        if steps.count(client) == 2 and rank == RANK:
            os.kill(os.getpid(), signal.SIGKILL)
        plain_backward(self)

    ClientSide._train = train  # type: ignore[method-assign]
    PersonalizedLM.on_after_backward = backward  # type: ignore[method-assign]


def overflow(who: str) -> None:
    """Let the second gradient of every turn overflow on one rank, before ranks add up."""
    plain = PersonalizedLM.on_after_backward

    def backward(self: Any) -> None:
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen == 2 and who in ("all", RANK):
            self.adapter.grads[3] = float("inf")
        plain(self)

    PersonalizedLM.on_after_backward = backward  # type: ignore[method-assign]


def same_secret(bits: int) -> int:
    """Stand in for the draw of a run's secret, so that two runs have the same noise."""
    return 2**bits // 3


def prepare(how: str, what: str) -> None:
    """Do what one option of the command line asks for."""
    match how:
        case "--patience":
            links.STEP_PATIENCE = timedelta(seconds=float(what))
        case "--dying-in-a-step":
            die_in_a_step(what)
        case "--overflowing":
            overflow(what)
        case _:
            spoil(how, what)


if __name__ == "__main__":
    noise.secrets.randbits = same_secret
    given, more = sys.argv[1:], list[str]()
    while given:
        if given[0] == "--resume":
            more = [f"{given.pop(0)}"] if given.pop(1) == "yes" else []
            continue
        if given[0].startswith("--"):
            prepare(given.pop(0), given.pop(0))
            continue
        sys.argv = ["pfl-lm", "finetune", given.pop(0), *more]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise

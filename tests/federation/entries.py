"""What the tests write into a ledger, and how they ask what is in it."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import torch

from pfl_lm.evaluate import Choice
from pfl_lm.federation.history import Member, StateFile
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.messages import Score, Update
from pfl_lm.methods import Upload

CLIENTS = [Member("a", "slug-a", 5, 1, 2, "rows-a"), Member("b", "slug-b", 7, 1, 0, "rows-b")]


def rows(ledger: Ledger, query: str) -> list[tuple[object, ...]]:
    """Ask on a connection of its own, which sees what is committed and nothing else."""
    with closing(sqlite3.connect(ledger.path)) as other:
        return other.execute(query).fetchall()


def file(name: str) -> StateFile:
    return StateFile(name, f"sha-{name}")


def turn(ledger: Ledger, client: str, round: int) -> None:
    update = Update(
        run="tiny",
        round=round,
        client=client,
        upload=Upload({"weights": torch.zeros(10), "more": torch.zeros(3)}, weight=5),
        state=file(f"{client}-{round}"),
        steps_done=4,
        summary={"loss_last": 0.5, "loss_first": 1.0},
        seconds=1.5,
    )
    ledger.commit_turn(update, file(f"up-{client}-{round}"), bytes_down=40)


def score(candidate: str, nll: float = 1.25) -> Score:
    return Score("validation", candidate, nll, rows=1, tokens=9)


def scored(round: int, client: str, *scores: Score, choice: Choice | None = None) -> Update:
    return Update(run="tiny", round=round, client=client, scores=scores, choice=choice)

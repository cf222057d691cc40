"""The only two things that cross a fleet's border."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pfl_lm.evaluate import Choice
from pfl_lm.federation.history import StateFile
from pfl_lm.methods import Broadcast, Upload

Kind = Literal["train", "evaluate", "finish"]
"""What a client is asked to do.

``train``: one turn of the method. ``evaluate``: score the method's own candidate on validation.
``finish``: score every candidate on validation, choose, read the test rows, once.
"""


Split = Literal["validation", "test"]
FaultKind = Literal["raised", "memory", "not_finite", "out_of_proportion"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a turn cannot count: it raised, ran out of memory, or returned what no turn should."""

    kind: FaultKind
    message: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """Orchestrator → fleet: one task for one client.

    Attributes:
        sent: what the method lets this client see of the server.
        state: the file this client's last turn was committed with; None before its first.
        steps: T, the optimizer steps of a ``train`` task.
        seed: fixes the turn's batches and dropout.
        check_loss: also say what the turn's batches' loss was at its start and at its end.
        halved: take micro-batches of half the rows, twice as many of them; the last try has run
            out of memory.
        noise_seed: of a ``train`` task, what its noise comes from; None if there is none.
        last: the summary of the client's last turn, where its next one goes by it.
    """

    run: str
    round: int
    client: str
    kind: Kind
    sent: Broadcast
    state: StateFile | None
    steps: int
    seed: int
    check_loss: bool = False
    halved: bool = False
    noise_seed: int | None = field(default=None, repr=False)  # a secret
    last: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Score:
    """One candidate's score on one split of one client: nats a supervised token.

    ``metrics``, by name, are there of final scores.
    """

    split: Split
    candidate: str
    nll: float
    rows: int
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Update:
    """Fleet → orchestrator: what came of one task.

    Attributes:
        upload: what the method sends; None for scoring tasks, and for a turn that has failed.
        state: the file the client wrote its state to, before this was sent.
        fault: why a turn has failed; the client's state is then as it was.
        scores: of scoring tasks.
        choice: of a ``finish`` task.
        summary: plain numbers about a turn, for the ledger.
        seconds: time the task took on the client's machine.
    """

    run: str
    round: int
    client: str
    upload: Upload | None = None
    state: StateFile | None = None
    fault: Fault | None = None
    scores: tuple[Score, ...] = ()
    choice: Choice | None = None
    steps_done: int = 0
    summary: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

"""One trial of a comparison: a method with one seed and one learning rate, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

State = Literal["missing", "begun", "failed", "finished"]
OVER: tuple[State, ...] = ("failed", "finished")
"""States of a trial that has nothing more to do."""

Rate = float | str


@dataclass(frozen=True, slots=True)
class ClientScore:
    """One candidate's score on one split of one client: nats a supervised token."""

    nll: float
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run came to.

    Attributes:
        own: the name of the method's own candidate, before any choice.
        chosen: which candidate is each client's model.
        scores: after the last round, by client, split and candidate.
        curve: (round, mean over clients of the validation loss), of the method's own candidate.
        steps: optimizer steps, over all rounds and clients, as they were done.
        seconds: time of the clients' turns, scoring not counted.
        faults: turns that have failed, once or for good; a run goes on without them.
        learning_rate: the number it was trained with, also where `auto` has found it.
    """

    own: str
    chosen: Mapping[str, str]
    scores: Mapping[str, Mapping[str, Mapping[str, ClientScore]]]
    curve: tuple[tuple[int, float], ...]
    steps: int
    bytes_down: int
    bytes_up: int
    seconds: float
    faults: int
    learning_rate: float

    def score(self, client: str, split: str, candidate: str | None = None) -> ClientScore | None:
        """Return the score of a client's chosen model, or of the candidate that is named."""
        candidates = self.scores[client].get(split, {})
        return candidates.get(candidate or self.chosen[client])


@dataclass(frozen=True, slots=True)
class Trial:
    """A method with one seed and one rate.

    Attributes:
        rate: as it was asked for: a number, or `auto`.
        state: whether it has run, and how that ended; ``failed`` is one that has diverged.
        reason: why it has failed, or how far it has got.
        about: device and versions it was run with.
        digest: of all that must be equal between the trials of a comparison; empty before it began.
    """

    name: str
    label: str
    method: str
    optimizer: str
    seed: int
    rate: Rate
    state: State
    reason: str = ""
    about: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    outcome: Outcome | None = None

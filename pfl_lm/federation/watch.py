"""What a run tells whoever watches it: a display, a tracker, a test."""

from __future__ import annotations

from dataclasses import dataclass

from pfl_lm.federation.messages import Update


@dataclass(frozen=True, slots=True)
class Workload:
    """How much there is to do, so that a display can say how long it takes.

    Attributes:
        steps: optimizer steps over all rounds and clients that are still to be done.
        rows: rows still to be scored over all rounds, clients and candidates.
        done: the last round that is over; None for a run that begins.
    """

    rounds: int
    clients: int
    steps: int
    rows: int
    done: int | None = None


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One round in a few numbers; losses in nats a supervised token.

    Attributes:
        train_loss: mean over the cohort of the last step's loss; None for round 0, and where
            training is private.
        mean: unweighted mean over clients of the candidate's validation score.
        worst: the largest of them, and whose it is.
    """

    round: int
    cohort: int
    candidate: str
    train_loss: float | None
    mean: float
    worst: float
    worst_client: str
    bytes_up: int
    seconds: float


class Watch:
    """Told of everything, does nothing. A display overrides what it shows."""

    def note(self, text: str) -> None:
        """Say something that is no part of the numbers."""

    def begin(self, workload: Workload) -> None:
        """Hear how much there is to do."""

    def step(self) -> None:
        """Hear of one optimizer step."""

    def rows(self, n: int) -> None:
        """Hear of ``n`` scored rows."""

    def turn(self, update: Update) -> None:
        """Hear of one client's committed turn."""

    def round(self, report: RoundReport) -> None:
        """Hear of a round, aggregated and scored."""


class Watches(Watch):
    """Passes everything on to several, in their order."""

    def __init__(self, *watches: Watch) -> None:
        self.watches = watches

    def note(self, text: str) -> None:
        """Pass it on."""
        for watch in self.watches:
            watch.note(text)

    def begin(self, workload: Workload) -> None:
        """Pass it on."""
        for watch in self.watches:
            watch.begin(workload)

    def step(self) -> None:
        """Pass it on."""
        for watch in self.watches:
            watch.step()

    def rows(self, n: int) -> None:
        """Pass it on."""
        for watch in self.watches:
            watch.rows(n)

    def turn(self, update: Update) -> None:
        """Pass it on."""
        for watch in self.watches:
            watch.turn(update)

    def round(self, report: RoundReport) -> None:
        """Pass it on."""
        for watch in self.watches:
            watch.round(report)

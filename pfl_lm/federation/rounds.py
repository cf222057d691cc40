"""The round loop: cohort → assign → run → aggregate → commit → evaluate → report."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pfl_lm.federation.cohort import cohort
from pfl_lm.federation.fleet.serial import Fleet
from pfl_lm.federation.ledger import Ledger, size_in_bytes
from pfl_lm.federation.messages import Assignment, Kind, Score, Update
from pfl_lm.federation.noise import client_noise
from pfl_lm.federation.store import Store
from pfl_lm.federation.watch import RoundReport, Watch
from pfl_lm.methods import Method, ServerState, Upload
from pfl_lm.recipe import Recipe
from pfl_lm.seeds import derive_seed
from pfl_lm.train.rate import RateTooHighError

NO_TURNS: Mapping[str, Update] = MappingProxyType({})


@dataclass(frozen=True)
class Orchestrator:
    """The server's side of a federation: whom it asks, what it averages, what it commits.

    ``steps`` are the optimizer steps of each client's turn; its keys are the clients. With
    ``check_first_round`` a client whose own batches' loss rises over round 1 ends the run.
    ``secret`` is what all noise comes from; None if there is none.
    """

    recipe: Recipe
    steps: Mapping[str, int]
    method: Method
    fleet: Fleet
    store: Store
    ledger: Ledger
    watch: Watch
    check_first_round: bool = False
    secret: int | None = field(default=None, repr=False)

    def run(self, server: ServerState) -> ServerState:
        """Run every round from the server's first state; return its last.

        Each turn, round and score is committed before the next begins. The last round's scoring is
        the final one: every candidate on validation, the choice, and the test rows, once.
        """
        rounds = self.recipe.federation.rounds
        self.ledger.commit_round(0, [], self.store.save_server(0, server))
        self._score(0, server, "evaluate")

        for round in range(1, rounds + 1):
            chosen = cohort(
                list(self.steps),
                self.recipe.federation.fraction_train,
                seed=self.recipe.seed,
                round=round,
            )
            turns = self._train(round, server, chosen)
            uploads = [upload_of(turns[client]) for client in sorted(turns)]
            server = self.method.aggregate(server, uploads, round)
            self.ledger.commit_round(round, chosen, self.store.save_server(round, server))
            self.store.discard(self.ledger.superseded(round))
            self._score(round, server, "finish" if round == rounds else "evaluate", turns)
        return server

    def _train(self, round: int, server: ServerState, chosen: list[str]) -> dict[str, Update]:
        turns = {}
        tasks = [self._task(round, server, client, "train") for client in chosen]
        sent = {task.client: size_in_bytes(task.sent.vectors.values()) for task in tasks}
        for update in self.fleet.run(tasks):
            file = self.store.save_upload(update.client, round, upload_of(update))
            self.ledger.commit_turn(update, file, bytes_down=sent[update.client])
            self.watch.turn(update)
            turns[update.client] = update
            _refuse_rising_loss(update)
        return turns

    def _score(
        self, round: int, server: ServerState, kind: Kind, turns: Mapping[str, Update] = NO_TURNS
    ) -> None:
        began = time.perf_counter()
        own = {}
        tasks = [self._task(round, server, client, kind) for client in sorted(self.steps)]
        for update in self.fleet.run(tasks):
            self.ledger.commit_scores(round, update.client, update.scores)
            if update.choice is not None:
                self.ledger.commit_choice(update.client, update.choice)
            own[update.client] = update.scores[0]
        self.watch.round(_report(round, own, turns, time.perf_counter() - began))

    def _task(self, round: int, server: ServerState, client: str, kind: Kind) -> Assignment:
        secret = self.secret if kind == "train" else None
        return Assignment(
            run=self.recipe.name,
            round=round,
            client=client,
            kind=kind,
            sent=self.method.broadcast(server, client),
            state=self.ledger.state_file(client),
            steps=self.steps[client],
            seed=derive_seed(self.recipe.seed, "turn", client, round),
            check_loss=self.check_first_round and round == 1 and kind == "train",
            noise_seed=None if secret is None else client_noise(secret, client, round),
        )


def _refuse_rising_loss(update: Update) -> None:
    """Raise if a turn that was asked to say so has made its own batches' loss rise."""
    before, after = (update.summary.get(f"batches_{when}") for when in ("before", "after"))
    if before is not None and after is not None and not after <= before:
        raise RateTooHighError(f"{update.client}: {before:.4f} to {after:.4f} over its first round")


def upload_of(update: Update) -> Upload:
    """Return what a turn has sent; a method that sends nothing sends an empty upload."""
    assert update.upload is not None
    return update.upload


def _report(
    round: int, own: Mapping[str, Score], turns: Mapping[str, Update], scoring_seconds: float
) -> RoundReport:
    worst = max(own, key=lambda client: own[client].nll)
    summaries = (update.summary for update in turns.values())  # private turns tell no losses
    losses = [summary["loss_last"] for summary in summaries if "loss_last" in summary]
    return RoundReport(
        round=round,
        cohort=len(turns),
        candidate=own[worst].candidate,
        train_loss=math.fsum(losses) / len(losses) if losses else None,
        mean=math.fsum(score.nll for score in own.values()) / len(own),
        worst=own[worst].nll,
        worst_client=worst,
        bytes_up=sum(size_in_bytes(upload_of(u).vectors.values()) for u in turns.values()),
        seconds=scoring_seconds + sum(update.seconds for update in turns.values()),
    )

"""The round loop: cohort → assign → run → aggregate → commit → evaluate → report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from pfl_lm.errors import PflError, listed
from pfl_lm.federation.cohort import Cohorts
from pfl_lm.federation.faults import (
    DIVERGED,
    TooFewClientsError,
    longest_update,
    refuse_other_kind,
    upload_fault,
)
from pfl_lm.federation.fleet.serial import Fleet
from pfl_lm.federation.history import MOST_TRIES, StateFile
from pfl_lm.federation.ledger import Ledger, size_in_bytes
from pfl_lm.federation.messages import Assignment, Fault, Kind, Update
from pfl_lm.federation.noise import client_noise
from pfl_lm.federation.store import Store, StoredUploads
from pfl_lm.federation.watch import RoundReport, Watch
from pfl_lm.methods import Broadcast, Method, ServerState, Upload
from pfl_lm.recipe import Recipe
from pfl_lm.seeds import derive_seed
from pfl_lm.train.rate import RateTooHighError


@dataclass(frozen=True)
class Orchestrator:
    """The server's side of a federation: whom it asks, what it averages, what it commits.

    ``steps`` are the optimizer steps of each client's turn; its keys are the clients. With
    ``check_first_round`` a client whose own batches' loss rises over round 1 ends the run.
    ``secret`` is what all noise comes from; None if there is none. With ``scaled`` gradients a turn
    goes on with the scale that the client's last one has ended with.
    """

    recipe: Recipe
    steps: Mapping[str, int]
    cohorts: Cohorts
    method: Method
    fleet: Fleet
    store: Store
    ledger: Ledger
    watch: Watch
    check_first_round: bool = False
    secret: int | None = field(default=None, repr=False)
    scaled: bool = False

    def run(self, start: ServerState) -> ServerState:
        """Run every round that is not over yet, and return the server's last state.

        A run that is new begins at ``start``. Each turn, round and score is committed before the
        next begins, and what is committed is not done again: the loop goes on wherever it was left.
        The last round's scoring is the final one: every candidate on validation, the choice, and
        the test rows, once.

        Raises:
            TooFewClientsError: a round has had fewer turns than it needs.
            RateTooHighError: with ``check_first_round``, a client's loss has risen.
        """
        last = self.ledger.last_round()
        if last is None:
            last, server = 0, start
            self._commit(0, server)
        else:
            server = self.store.load_server(self.ledger.server_file(last))
            refuse_other_kind(f"the server's state after round {last}", server, start)
        self._welcome(last, server)
        if last:
            self._score(last, server)

        for round in range(last + 1, self.recipe.federation.rounds + 1):
            self._draw(round)
            self._train(round, server)
            server = self.method.aggregate(server, self._uploads(round), round)
            self._commit(round, server)
            self._welcome(round, server)
            self._score(round, server)
        return server

    def _draw(self, round: int) -> None:
        """Settle who takes part, once: members may come and go before the round is over."""
        if self.ledger.cohort(round) is None:
            members = [m.client for m in self.ledger.members() if m.joined < round]
            self.ledger.commit_cohort(round, self.cohorts(round, members))

    def _train(self, round: int, server: ServerState) -> None:
        """Let the cohort take its turns; who fails is asked once more, then left out."""
        if self._checks(round):
            for turn in self.ledger.turns(round):
                _refuse_rising_loss(turn.client, turn.summary)
        most = longest_update(server)
        while waiting := self.ledger.waiting(round):
            sent: dict[str, Broadcast] = {}
            tasks = self._to_train(round, server, self.fleet.order("train", waiting), sent)
            with self._on_disk(), closing(self.fleet.run(tasks)) as updates:
                for update in updates:
                    self._settle(update, sent.pop(update.client), most)
        turns = len(self.ledger.turns(round))
        if turns < self.recipe.federation.min_clients:
            self.ledger.forgive(round)
            raise self._too_few(round, turns)

    def _to_train(
        self,
        round: int,
        server: ServerState,
        clients: list[str],
        sent: dict[str, Broadcast],
        *,
        counted: bool = True,
    ) -> Iterator[Assignment]:
        """Yield a task for each client, and note in ``sent`` what it is sent, each as it begins."""
        for client in clients:
            sent[client] = replace(self.method.broadcast(server, client), counted=counted)
            yield self._task(round, "train", client, sent[client])

    def _welcome(self, round: int, server: ServerState) -> None:
        """Let clients who have joined take a turn that is theirs alone: nothing is averaged."""
        sent: dict[str, Broadcast] = {}
        newcomers = self.fleet.order("train", self.ledger.newcomers(round))
        tasks = self._to_train(round, server, newcomers, sent, counted=False)
        with self._on_disk(), closing(self.fleet.run(tasks)) as updates:
            for update in updates:
                if update.fault is not None:
                    what = update.fault.message
                    raise PflError(f"{update.client}: its first turn has failed: {what}")
                kept = replace(update, upload=Upload({}, weight=0.0))
                self._keep(kept, None, sent.pop(update.client))
                self.watch.turn(update)

    def _settle(self, update: Update, sent: Broadcast, most: float) -> None:
        """Commit what came of a turn: itself, before `_on_disk` is over, or its fault, at once."""
        round, client = update.round, update.client
        fault = update.fault or upload_fault(sent, upload_of(update), most)
        if fault is not None and fault.kind in DIVERGED and self._checks(round):
            raise RateTooHighError(f"{client}: {fault.message}")
        if fault is not None:
            self.store.settle()
            self._note(update, fault, self.ledger.commit_fault(round, client, fault))
            if update.state is not None:  # written before the upload was looked at
                self.store.discard([update.state.path])
            return
        self._keep(update, self.store.save_upload(client, round, upload_of(update)), sent)
        self.watch.turn(update)
        _refuse_rising_loss(client, update.summary)

    def _keep(self, update: Update, file: StateFile | None, sent: Broadcast) -> None:
        """Commit a turn as soon as its files are on disk, while the next client trains."""
        down = size_in_bytes(sent.vectors.values())
        self.store.then(partial(self.ledger.commit_turn, update, file, bytes_down=down))

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Do not leave the body, well or not, before its turns are committed."""
        try:
            yield
        finally:
            self.store.settle()

    def _note(self, update: Update, fault: Fault, tries: int) -> None:
        then = "trying once more" if tries < MOST_TRIES else "it sits this round out"
        what = fault.kind.replace("_", " ")
        self.watch.note(
            f"round {update.round}: {update.client}'s turn failed ({what}: {fault.message}); {then}"
        )

    def _checks(self, round: int) -> bool:
        return self.check_first_round and round == 1

    def _uploads(self, round: int) -> StoredUploads:
        turns = self.ledger.turns(round)
        files = [(turn.client, turn.upload) for turn in turns if turn.upload is not None]
        return StoredUploads(self.store, files)

    def _commit(self, round: int, server: ServerState) -> None:
        self.ledger.commit_round(round, self.store.save_server(round, server))
        self.store.discard(self.ledger.superseded(round))

    def _score(self, round: int, server: ServerState) -> None:
        """Score every client that has not been, and report the round.

        The untouched backbone, which is round 0, waits for round 1: training comes first.
        """
        if round == 1:
            self._score(0, server)
        began = time.perf_counter()
        final = round == self.recipe.federation.rounds
        done = self.ledger.chosen(round) if final else self.ledger.scored(round)
        kind: Kind = "finish" if final else "evaluate"
        members = [m.client for m in self.ledger.members() if m.joined <= round]
        due = self.fleet.order(kind, [client for client in members if client not in done])
        candidate = None
        with closing(self.fleet.run(self._to_score(round, kind, server, due))) as updates:
            for update in updates:
                self.ledger.commit_scores(update)
                candidate = update.scores[0].candidate
        if candidate is not None:
            self.watch.round(self._report(round, candidate, time.perf_counter() - began))

    def _to_score(
        self, round: int, kind: Kind, server: ServerState, clients: list[str]
    ) -> Iterator[Assignment]:
        for client in clients:
            yield self._task(round, kind, client, self.method.broadcast(server, client))

    def _task(self, round: int, kind: Kind, client: str, sent: Broadcast) -> Assignment:
        training = kind == "train"
        secret = self.secret if training else None
        return Assignment(
            run=self.recipe.name,
            round=round,
            client=client,
            kind=kind,
            sent=sent,
            state=self.ledger.state_file(client),
            steps=self.steps[client],
            seed=derive_seed(self.recipe.seed, "turn", client, round),
            check_loss=self._checks(round) and training,
            noise_seed=None if secret is None else client_noise(secret, client, round),
            halved=training and self.ledger.last_fault(round, client) == "memory",
            last=self.ledger.last_summary(client) if training and self.scaled else {},
        )

    def _report(self, round: int, candidate: str, scoring_seconds: float) -> RoundReport:
        own = self.ledger.validation(round, candidate)
        turns = self.ledger.turns(round)
        worst = max(own, key=lambda client: own[client])
        losses = [turn.summary["loss_last"] for turn in turns if "loss_last" in turn.summary]
        return RoundReport(
            round=round,
            cohort=len(turns),
            candidate=candidate,
            train_loss=sum(losses) / len(losses) if losses else None,
            mean=sum(own.values()) / len(own),
            worst=own[worst],
            worst_client=worst,
            bytes_up=sum(turn.bytes_up for turn in turns),
            seconds=scoring_seconds + sum(turn.seconds for turn in turns),
        )

    def _too_few(self, round: int, turns: int) -> TooFewClientsError:
        faults = self.ledger.faults(round)
        said = [f"{client}: {message}" for client, (_, message) in faults.items()]
        hint = "mend what they say, then resume: those who failed are asked again"
        if faults and all(kind in DIVERGED for kind, _ in faults.values()):
            rate = self.recipe.training.learning_rate
            hint = (
                f"training has diverged: lower training.learning_rate (now {rate:g}), in a new run"
            )
        return TooFewClientsError(
            listed(
                f"round {round}: {turns} of {len(self.ledger.cohort(round) or [])} clients came "
                f"through, federation.min_clients is {self.recipe.federation.min_clients}",
                said,
            ),
            hint=hint,
        )


def _refuse_rising_loss(client: str, summary: Mapping[str, float]) -> None:
    """Raise if a turn that was asked to say so has made its own batches' loss rise."""
    before, after = (summary.get(f"batches_{when}") for when in ("before", "after"))
    if before is not None and after is not None and not after <= before:
        raise RateTooHighError(f"{client}: {before:.4f} to {after:.4f} over its first round")


def upload_of(update: Update) -> Upload:
    """Return what a turn has sent; a method that sends nothing sends an empty upload."""
    assert update.upload is not None
    return update.upload

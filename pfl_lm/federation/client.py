"""What happens on a client's machine: the one place where a method meets a client's data.

A task comes in, its state is read from disk, the method runs, the state is written, and only then
does an update go out. A turn that fails leaves the state as it was. Nothing of a client outlives
its task in memory, save how the untouched backbone did on its validation rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pfl_lm.data.examples import Example
from pfl_lm.data.federated import FederatedDataset
from pfl_lm.data.words import short
from pfl_lm.errors import DivergedError
from pfl_lm.evaluate import BASE, RowScores, choose, score
from pfl_lm.evaluate.answers import Answers
from pfl_lm.evaluate.metrics import metrics_of
from pfl_lm.federation.faults import (
    attempted,
    in_smaller_batches,
    refuse_not_finite,
    refuse_other_kind,
)
from pfl_lm.federation.history import StateFile
from pfl_lm.federation.messages import Assignment, Score, Split, Update
from pfl_lm.federation.own_head import apart, with_own_head
from pfl_lm.federation.store import Store
from pfl_lm.federation.watch import Watch
from pfl_lm.layout import AdapterLayout, Vector
from pfl_lm.methods import Broadcast, ClientInfo, ClientState, Method, ServerState, Upload
from pfl_lm.model.adapter import Adapter
from pfl_lm.privacy.dpsgd import RecordLevel
from pfl_lm.recipe import RecordLevelOptions, TrainingOptions
from pfl_lm.recipe.own import Own
from pfl_lm.train import LocalTrainer, TurnDiagnostics
from pfl_lm.train.share import Share


@dataclass
class ClientSide:
    """Everything a task needs, for clients that share one resident backbone.

    ``base`` is how the untouched backbone did on each client's rows, by client and split. It is the
    same in every run of one backbone, so several may share it. With ``diagnose`` a turn's summary
    has numbers layer by layer. ``own`` is what each client goes by, with the rates of
    ``training``; the vectors of one whose adapter is smaller are of its own layout, in states,
    uploads and candidates, and fit into the one resident adapter.

    With a ``share`` several ranks take every task together, each its part of the rows, and all come
    to the same; the first of them alone writes the client's state. With ``private_head`` each
    client keeps a head of its own. With ``answers`` final scores have metrics of what the chosen
    model and the backbone write.
    """

    method: Method
    adapter: Adapter
    start: Vector
    dataset: FederatedDataset
    training: TrainingOptions
    pad_token_id: int
    store: Store
    watch: Watch
    group_by_length: bool = False
    record_level: RecordLevelOptions | None = None
    diagnose: bool = False
    private_head: bool = False
    answers: Answers | None = None
    base: dict[tuple[str, Split], RowScores] = field(default_factory=dict)
    share: Share | None = None
    own: Mapping[str, Own] = field(default_factory=dict)

    def training_of(self, client: str) -> TrainingOptions:
        """Return how a client trains."""
        return self.own[client].training if client in self.own else self.training

    def layout_of(self, client: str) -> AdapterLayout:
        """Return the layout of a client's own vectors."""
        return self.method.setup.layout_of(client)

    def start_of(self, client: str) -> Vector:
        """Return the untouched adapter that a client starts from."""
        return self.adapter.layout.taken(self.start, self.layout_of(client))

    def carry_out(self, task: Assignment) -> Update:
        """Do one task and return what may leave the client."""
        match task.kind:
            case "train":
                return attempted(self._train, task)
            case "evaluate":
                return self._evaluate(task)
            case "finish":
                return self._finish(task)

    def state(self, client: str, file: StateFile | None) -> ClientState:
        """Return the state a client's last turn was committed with, or the one it begins with.

        With it a head of its own is kept: see `apart`.
        """
        info = ClientInfo(client, self.dataset.n_train(client), self.layout_of(client))
        head = self.start[self.adapter.layout.head].clone() if self.private_head else None
        first = with_own_head(self.method.init_client(info, self.start_of(client)), head)
        if file is None:
            return first
        state = self.store.load_client(file)
        refuse_other_kind(f"{client}'s state, {file.path}", state, first)
        return state

    def candidates(self, client: str, sent: Broadcast, file: StateFile | None) -> dict[str, Vector]:
        """Return every model that could be this client's, the method's own first, base last.

        All but the last have the client's own head, if it has one.
        """
        layout = self.layout_of(client)
        state, head = apart(self.state(client, file))
        found = dict(self.method.candidates(sent, state))
        if head is not None:
            found = {name: layout.with_head(vector, head) for name, vector in found.items()}
        return {**found, BASE: layout.without_effect(self.start_of(client))}

    def shared(self, server: ServerState) -> Vector | None:
        """Return the shared adapter as the server has it, whole; None if the method has none."""
        nobody = self.method.init_client(ClientInfo("", 0, self.adapter.layout), self.start)
        return self.method.candidates(self.method.broadcast(server, ""), nobody).get("global")

    def local_run(
        self,
        client: str,
        steps: int,
        seed: int,
        noise_seed: int | None = None,
        *,
        halved: bool = False,
        last: Mapping[str, float] | None = None,
    ) -> LocalTrainer:
        """Return what a method may do with this client's data in a turn of ``steps`` steps.

        ``last`` is the summary of the client's last turn, where this one goes by it.
        """
        private = None
        if self.record_level is not None:
            assert noise_seed is not None
            private = RecordLevel(self.record_level, noise_seed)
        training = self.training_of(client)
        return LocalTrainer(
            self.adapter,
            self.dataset.train(client),
            in_smaller_batches(training) if halved else training,
            steps=steps,
            pad_token_id=self.pad_token_id,
            seed=seed,
            on_step=self.watch.step,
            group_by_length=self.group_by_length,
            private=private,
            diagnostics=TurnDiagnostics(self.adapter.layout) if self.diagnose else None,
            layout=self.layout_of(client),
            share=self.share,
            before=last,
        )

    def _train(self, task: Assignment) -> Update:
        began = time.perf_counter()
        run = self.local_run(
            *(task.client, task.steps, task.seed, task.noise_seed),
            halved=task.halved,
            last=task.last,
        )
        before, head = apart(self.state(task.client, task.state))
        run.head = head
        upload, state = self.method.turn(task.sent, before, run)
        kept = with_own_head(state, run.head)
        if run.diagnostics is not None:
            run.summary.update(run.diagnostics.summary(task.sent.vectors))
        if task.check_loss:
            start, end = before.vectors["weights"], state.vectors["weights"]
            run.head, own = head, run.head
            run.summary["batches_before"] = run.mean_loss(start, task.steps)
            run.head = own
            run.summary["batches_after"] = run.mean_loss(end, task.steps)
        refuse_not_finite("state", kept.vectors)
        refuse_not_finite("upload", upload.vectors)
        return Update(
            run=task.run,
            round=task.round,
            client=task.client,
            upload=upload,
            state=self._saved(task, kept, upload),
            steps_done=int(run.summary.pop("steps_done")),
            summary=run.summary,
            seconds=time.perf_counter() - began,
        )

    def _saved(self, task: Assignment, state: ClientState, upload: Upload) -> StateFile | None:
        """Write a client's state; of ranks that share its turn, the first does, for all."""
        if self.share is not None:
            held = [*state.vectors.values(), *upload.vectors.values()]
            self.share.refuse_apart(f"client {short(task.client)}", *held)
            if self.share.rank:
                return None
        return self.store.save_client(task.client, task.round, state)

    def _evaluate(self, task: Assignment) -> Update:
        began = time.perf_counter()
        rows = self.dataset.validation(task.client)
        candidates = self.candidates(task.client, task.sent, task.state)
        name = next(iter(candidates)) if task.round else BASE  # round 0 is before any training
        scored = self._rows(task, "validation", name, candidates[name], rows)
        return Update(
            run=task.run,
            round=task.round,
            client=task.client,
            scores=(_score("validation", name, scored),),
            seconds=time.perf_counter() - began,
        )

    def _finish(self, task: Assignment) -> Update:
        began = time.perf_counter()
        candidates = self.candidates(task.client, task.sent, task.state)
        rows = self.dataset.validation(task.client)
        scored = {
            name: self._rows(task, "validation", name, vector, rows)
            for name, vector in candidates.items()
        }
        choice = choose(scored, default=next(iter(candidates)))
        scores = [_final("validation", name, found, rows) for name, found in scored.items()]
        if test := self.dataset.test(task.client):
            for name, vector in candidates.items():
                found = self._rows(task, "test", name, vector, test)
                scores.append(_final("test", name, found, test))
        if self.answers is not None:
            asked = {name: candidates[name] for name in (choice.candidate, BASE)}
            scores = self._with_answers(scores, self.answers, asked, rows, test)
        return Update(
            run=task.run,
            round=task.round,
            client=task.client,
            scores=tuple(scores),
            choice=choice,
            seconds=time.perf_counter() - began,
        )

    def _with_answers(
        self,
        scores: list[Score],
        answers: Answers,
        asked: dict[str, Vector],
        validation: tuple[Example, ...],
        test: tuple[Example, ...],
    ) -> list[Score]:
        """Let the models ``asked`` write answers; return the scores with what came of it."""
        rows = {"validation": validation, "test": test}
        found = {
            (split, name): answers.metrics(self.adapter, vector, rows[split])
            for name, vector in asked.items()
            for split in rows
            if rows[split]
        }
        return [
            replace(s, metrics={**s.metrics, **found.get((s.split, s.candidate), {})})
            for s in scores
        ]

    def _rows(
        self,
        task: Assignment,
        split: Split,
        name: str,
        vector: Vector,
        examples: tuple[Example, ...],
    ) -> RowScores:
        """Score a candidate; the untouched backbone once for each client and split."""
        known = self.base.get((task.client, split)) if name == BASE else None
        if name == BASE and self.share is not None and not self.share.all_have(known is not None):
            known = None
        if known is not None:
            return known
        scored = score(
            self.adapter,
            self.adapter.layout.filled(vector, self.layout_of(task.client)),
            examples,
            batch_size=self.training.per_device_eval_batch_size,
            pad_token_id=self.pad_token_id,
            on_rows=self.watch.rows,
            share=self.share,
        )
        if not math.isfinite(scored.mean):
            raise DivergedError(
                f"client {short(task.client)}: the loss of its {name} model is {scored.mean} "
                f"after round {task.round}: training has diverged",
                hint="lower training.learning_rate (for this client now "
                f"{self.training_of(task.client).learning_rate:g})",
            )
        if name == BASE:
            self.base[task.client, split] = scored
        return scored


def _final(split: Split, candidate: str, found: RowScores, rows: tuple[Example, ...]) -> Score:
    metrics = metrics_of(found, [row.label for row in rows])
    return replace(_score(split, candidate, found), metrics=metrics)


def _score(split: Split, candidate: str, rows: RowScores) -> Score:
    return Score(split, candidate, rows.mean, len(rows.nll), sum(rows.tokens))

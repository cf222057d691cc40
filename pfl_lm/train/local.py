"""One client's turn on this machine: a Lightning fit from a start to where T steps lead."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from pfl_lm.data.batches import OF_ROWS, accumulation_of_rank, training_batches
from pfl_lm.data.poisson import poisson_steps
from pfl_lm.errors import RecipeError
from pfl_lm.layout import Factor, Vector
from pfl_lm.privacy.spent import expected_rows, noted
from pfl_lm.seeds import derive_seed
from pfl_lm.train.loss import nll_sum
from pfl_lm.train.module import Moments, PersonalizedLM
from pfl_lm.train.nested import Ticker, quiet, trainer_for
from pfl_lm.train.scaling import FIRST_SCALE, scaling_for

if TYPE_CHECKING:
    from pfl_lm.data.examples import Example
    from pfl_lm.layout import AdapterLayout
    from pfl_lm.model.adapter import Adapter
    from pfl_lm.privacy.dpsgd import PrivateGradient, RecordLevel
    from pfl_lm.recipe import TrainingOptions
    from pfl_lm.train.diagnostics import TurnDiagnostics
    from pfl_lm.train.share import Share

# Lightning sets its loggers to INFO on import and would greet every client of every round.
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class LocalTrainer:
    """What a method may do with one client's data during one turn.

    Args:
        adapter: the resident adapter.
        examples: the client's tokenized training rows.
        training: rates, batch sizes, optimizer.
        steps: T, the optimizer steps of this turn.
        pad_token_id: what fills a batch up.
        seed: fixes batches and dropout; every fit of the turn sees the same ones.
        on_step: called after each optimizer step.
        group_by_length: whether rows of like length come together in training.
        private: the record-level lever, if it is set: every fit then trains by DP-SGD.
        diagnostics: looks on at every fit, if there is one; it changes none.
        layout: of the client's own adapter, if it is smaller than the resident one: vectors that
            come and go are of it.
        share: which part of the turn is this rank's, if several take it together. All of them call
            the same methods in the same order, and all end at the same bits.
        before: the summary of the client's last turn, which says how to scale float16's gradients.
        head: the client's own head, if it has one of its own: see the attribute.

    Attributes:
        n_examples: the client's training rows.
        n_tokens: their supervised tokens.
        learning_rate: η of this client.
        summary: plain numbers about the turn, for the ledger; a method may add its own. Steps are
            those of all fits so far, losses those of the last.
        onlookers: what every fit of the turn tells after a method's own callbacks; they change
            nothing.
        head: a private head as the last fit has left it, or the turn before; None where the head
            is shared or there is none. It is put in before the model is run, whatever stands there
            in a vector that is given, and what comes back has there what was given: so nothing of
            it is in what a method gets to see. Every fit of a turn trains it.
    """

    def __init__(
        self,
        adapter: Adapter,
        examples: Sequence[Example],
        training: TrainingOptions,
        *,
        steps: int,
        pad_token_id: int,
        seed: int,
        on_step: Callable[[], None] | None = None,
        group_by_length: bool = False,
        private: RecordLevel | None = None,
        diagnostics: TurnDiagnostics | None = None,
        layout: AdapterLayout | None = None,
        share: Share | None = None,
        before: Mapping[str, float] | None = None,
        head: Vector | None = None,
    ) -> None:
        self.adapter = adapter
        self.examples = examples
        self.training = training
        self.steps = steps
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.group_by_length = group_by_length
        self.private = private
        self.diagnostics = diagnostics
        self.layout = layout or adapter.layout
        self.share = share
        self.scaling = None if private is not None else scaling_for(adapter, before or {})
        self.head = head
        self.n_examples = len(examples)
        self.learning_rate = training.learning_rate
        self.n_tokens = sum(example.n_supervised for example in examples)
        self.summary: dict[str, float] = {}
        self.onlookers: list[L.Callback] = [] if on_step is None else [Ticker(on_step)]
        self._fits = 0

    def train(
        self,
        start: Vector,
        *,
        steps: int,
        callbacks: Sequence[L.Callback] = (),
        trainable: Factor | None = None,
        moments: Moments | None = None,
    ) -> Vector:
        """Run one fit of ``steps`` optimizer steps from ``start``; return where it ends, ``(d,)``.

        ``moments``, if given, go on and are updated in place. Overwrites the resident adapter, and
        it is that which callbacks see, be the client's own smaller.
        """
        self._write(start)
        self.adapter.train_only(trainable)
        self.adapter.model.train()
        private, batches, accumulation = self._gradients(steps)
        if self.diagnostics is not None:
            callbacks = self.diagnostics.around(start, callbacks)
        running = None if moments is None else self._filled(moments)
        module = PersonalizedLM(
            self.adapter,
            self.training,
            running,
            private,
            self.share,
            private_head=self.head is not None,
        )
        device = self.adapter.weights.device
        with (
            quiet(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            nullcontext() if private is None else private.watching(),
        ):
            torch.manual_seed(self._dropout_seed())
            looking_on = [*callbacks, *self.onlookers]
            trainer = trainer_for(device, accumulation, steps, looking_on, self.scaling)
            left_out = self._left_out()
            trainer.fit(module, batches)
        if moments is not None and running is not None:
            self._take(running, moments)
            moments.step += trainer.global_step - (self._left_out() - left_out)
        self.adapter.model.eval()
        self._note(module, trainer)
        end = self._read(start)
        if self.diagnostics is not None:
            self.diagnostics.ended(end)
        return end

    def loss_and_grad(self, at: Vector, batch: Mapping[str, Any]) -> tuple[float, Vector]:
        """Return the mean token loss of one batch at ``at`` and its gradient, ``(d,)``.

        Overwrites the resident adapter. Ranks that share the turn are given the same whole batch,
        and each takes its part of the rows.

        Raises:
            RecipeError: the record-level lever is set, which covers nothing but fits.
        """
        self._refuse_bare_numbers()
        self._write(at)
        self.adapter.train_only(None)
        scale = 1.0 if self.scaling is None else FIRST_SCALE
        loss, grad = self._scaled_grad(batch, scale)
        while not bool(grad.isfinite().all()) and scale > 1:
            scale /= 2
            loss, grad = self._scaled_grad(batch, scale)
        return float(loss), grad

    def _scaled_grad(self, batch: Mapping[str, Any], scale: float) -> tuple[Tensor, Vector]:
        self.adapter.zero_grad()
        loss = self.adapter.weights.new_zeros(())
        if (mine := self._part(batch)) is not None:
            nll = nll_sum(self.adapter.forward, mine) / batch["window_tokens"]
            (nll * scale).backward()
            loss = nll.detach()
        found = torch.cat([self.adapter.grads / scale, loss.reshape(1)])
        if self.share is not None:
            self.share.add_up(found)
        grads = self.adapter.layout.taken(found[:-1], self.layout)
        if self.head is not None:
            grads[self.adapter.layout.head] = 0.0
        return found[-1], grads

    def _part(self, batch: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return this rank's rows of a batch, the longest of them as long as before; None if none.

        ``positions`` are left for the loss to find anew.
        """
        if self.share is None:
            return batch
        rows = slice(self.share.rank, None, self.share.n_ranks)
        part = {name: batch[name][rows] for name in OF_ROWS if name in batch}
        return part if len(part["input_ids"]) else None

    def windows(self, steps: int) -> Iterator[list[Mapping[str, Any]]]:
        """Yield the micro-batches of each optimizer step of a fit, placed on the device.

        They are the whole step's, also where ranks share the turn.
        """
        return self._placed(self._batches(steps), self.training.gradient_accumulation_steps)

    @torch.no_grad()
    def mean_loss(self, at: Vector, steps: int) -> float:
        """Return the mean loss of a fit's batches at fixed weights, nats a supervised token.

        Overwrites the resident adapter, trains nothing.

        Raises:
            RecipeError: the record-level lever is set, which covers nothing but fits.
        """
        self._refuse_bare_numbers()
        self._write(at)
        losses = torch.tensor([self._mean_nll(window) for window in self._own_windows(steps)])
        if self.share is not None:
            losses = losses.to(at.device)
            self.share.add_up(losses)
        return math.fsum(losses.tolist()) / len(losses)

    def _mean_nll(self, window: Sequence[Mapping[str, Any]]) -> float:
        """Return what the rows of some micro-batches add to the mean loss of their window."""
        parts = (
            nll_sum(self.adapter.forward, batch) / batch["window_tokens"]
            for batch in window
            if "input_ids" in batch
        )
        return float(sum(parts))

    def _own_windows(self, steps: int) -> Iterator[list[Mapping[str, Any]]]:
        """Yield this rank's part of each optimizer step, as `windows` does the whole."""
        return self._placed(self._batches(steps, self.share), self._accumulation())

    def _placed(self, loader: Any, accumulation: int) -> Iterator[list[Mapping[str, Any]]]:
        device = self.adapter.weights.device
        batches = (move_data_to_device(batch, device) for batch in loader)
        while window := list(islice(batches, accumulation)):
            yield window

    def _accumulation(self) -> int:
        """Return how many micro-batches of an optimizer step are this rank's."""
        n_ranks = 1 if self.share is None else self.share.n_ranks
        return accumulation_of_rank(self.training.gradient_accumulation_steps, n_ranks)

    def _dropout_seed(self) -> int:
        """Return the turn's seed; of ranks that share it, each has one of its own."""
        if self.share is None:
            return self.seed
        return derive_seed(self.seed, "dropout", self.share.rank)

    def _left_out(self) -> int:
        return 0 if self.scaling is None else self.scaling.left_out

    def _write(self, vector: Vector) -> None:
        self.adapter.write(self.adapter.layout.filled(vector, self.layout))
        if self.head is not None:
            with torch.no_grad():
                self.adapter.weights[self.adapter.layout.head] = self.head

    def _filled(self, moments: Moments) -> Moments:
        """Return moments of the resident adapter: these, and zeros where the own one has none."""
        if self.layout == self.adapter.layout:
            return moments
        whole = self.adapter.layout
        first, second = (
            whole.filled(each, self.layout) for each in (moments.first, moments.second)
        )
        return Moments(first, second, moments.step)

    def _take(self, running: Moments, moments: Moments) -> None:
        if running is not moments:
            whole = self.adapter.layout
            moments.first.copy_(whole.taken(running.first, self.layout))
            moments.second.copy_(whole.taken(running.second, self.layout))

    def _read(self, start: Vector) -> Vector:
        """Return where a fit has ended; a private head stays here, and the start's is returned."""
        end = self.adapter.layout.taken(self.adapter.read(), self.layout)
        if self.head is not None:
            at = self.adapter.layout.head
            self.head = end[at].clone()
            end[at] = start[at]
        return end

    def _gradients(self, steps: int) -> tuple[PrivateGradient | None, Any, int]:
        """Return what a fit's gradients go through, its batches, and how many make a step."""
        if self.private is None:
            return None, self._batches(steps, self.share), self._accumulation()
        fit, self._fits = self._fits, self._fits + 1
        expected = expected_rows(self.n_examples, self.training.rows_in_step)
        batches = poisson_steps(
            self.examples,
            steps=steps,
            rate=expected / self.n_examples,
            batch_size=self.training.per_device_train_batch_size,
            pad_token_id=self.pad_token_id,
            seed=self.private.sampling_seed(fit),
            **_place(self.share),
        )
        whole = self.adapter.layout
        trained = None if self.layout == whole else whole.where(self.layout)
        return self.private.gradient(self.adapter, fit, expected, trained), batches, 1

    def _refuse_bare_numbers(self) -> None:
        if self.private is not None:
            raise RecipeError(
                "privacy.record_level: this method reads losses or gradients outside of training, "
                "where no noise is added",
                hint="leave privacy.record_level out, or choose another method",
            )

    def _batches(self, steps: int, share: Share | None = None) -> Any:
        return training_batches(
            self.examples,
            steps=steps,
            accumulation=self.training.gradient_accumulation_steps,
            batch_size=self.training.per_device_train_batch_size,
            pad_token_id=self.pad_token_id,
            seed=self.seed,
            group_by_length=self.group_by_length,
            **_place(share),
        )

    def _note(self, module: PersonalizedLM, trainer: L.Trainer) -> None:
        losses = []
        if module.step_losses:
            shares = torch.stack(module.step_losses)
            if self.share is not None:
                self.share.add_up(shares)
            losses = shares.tolist()
        self.summary["steps_done"] = self.summary.get("steps_done", 0.0) + trainer.global_step
        if losses:
            self.summary["loss_first"] = losses[0]
            self.summary["loss_last"] = losses[-1]
        if self.scaling is not None:
            self.summary.update(self.scaling.summary())
        if module.private is not None and self.private is not None:
            self._account(module.private, self.private)

    def _account(self, fit: PrivateGradient, lever: RecordLevel) -> None:
        """Say what an accountant has to know, of this fit and of those before it in the turn."""
        steps = int(self.summary.get("dp_steps", 0)) + fit.released
        sigma, rows_in_step = lever.options.noise_multiplier, self.training.rows_in_step
        self.summary.update(noted(sigma, self.n_examples, rows_in_step, steps))


def _place(share: Share | None) -> dict[str, int]:
    """Return by which names loaders know a rank's share; none for all rows."""
    return {} if share is None else {"rank": share.rank, "n_ranks": share.n_ranks}

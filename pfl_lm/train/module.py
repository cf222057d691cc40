"""The LightningModule of a client turn: a frozen backbone and one client's adapter.

Lightning sees the adapter's parameters and nothing else. The backbone is held unregistered, so that
no fit moves it, counts it or puts it into a checkpoint; and as the adapter's parameters are views
into one vector that already lies on the right device, moving the module is a no-op too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from typing_extensions import override

from pfl_lm.layout import AdapterLayout, Vector
from pfl_lm.train.loss import mean_nll_by_row, nll_sum

if TYPE_CHECKING:
    from pfl_lm.model.adapter import Adapter
    from pfl_lm.privacy.dpsgd import PrivateGradient
    from pfl_lm.recipe import TrainingOptions
    from pfl_lm.train.share import Share


@dataclass(slots=True)
class Moments:
    """AdamW's running moments, for a method that keeps them from one turn to the next.

    ``first`` and ``second`` have shape ``(d,)``; a fit that is given them updates all in place.
    """

    first: Vector
    second: Vector
    step: int = 0

    @classmethod
    def zeros(cls, d: int, device: torch.device | str | None = None) -> Moments:
        """Return the moments of an optimizer that has taken no step."""
        return cls(torch.zeros(d, device=device), torch.zeros(d, device=device))


class PersonalizedLM(L.LightningModule):
    """One client's adapter in training on the shared backbone.

    Args:
        adapter: the resident adapter, already holding this client's start.
        training: learning rate, optimizer, accumulation.
        moments: AdamW's moments to go on from, updated in place; None starts from zero.
        private: what every gradient goes through before anything sees it; None leaves them as
            they are. With it a batch is a whole step of `poisson_steps`.
        share: which part of every optimizer step is this rank's; None if all of it is. The
            gradient is then added up over the ranks once a step, before anything sees it.
        private_head: whether the head is the client's own, so that no pull towards what is shared
            is for it.

    Attributes:
        step_losses: one scalar tensor an optimizer step, nats a supervised token; none if private.
            With a share, what this rank's rows add to it.
    """

    def __init__(
        self,
        adapter: Adapter,
        training: TrainingOptions,
        moments: Moments | None = None,
        private: PrivateGradient | None = None,
        share: Share | None = None,
        *,
        private_head: bool = False,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.personal = nn.ParameterList(adapter.parameters())
        self.training_options = training
        self.moments = moments
        self.private = private
        self.share = share
        self.private_head = private_head
        self.step_losses: list[Tensor] = []

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch, scaled so that accumulation cancels out.

        Lightning divides by the number of accumulated micro-batches; what is left is the window's
        summed nll over the window's supervised tokens, and with a share, this rank's part of it.

        A private step goes backward here, row by row, and returns a loss without a gradient.
        """
        if self.private is not None:
            return self._private_step(self.private, batch)
        accumulation: int = self.trainer.accumulate_grad_batches
        nll = nll_sum(self.adapter.forward, batch) if "input_ids" in batch else self._nothing()
        self._count(nll.detach() / batch["window_tokens"], first=batch_idx % accumulation == 0)
        window_tokens: int = batch["window_tokens"]
        return nll * accumulation / window_tokens

    @override
    def on_after_backward(self) -> None:
        """Once a step, make the gradient the whole step's: all ranks' parts, and private if so."""
        if self.share is not None and self._window_is_over():
            self.share.add_up(self.adapter.grads if self.private is None else self.private.total)
        if self.private is not None:
            self.private.release()

    def _window_is_over(self) -> bool:
        accumulation: int = self.trainer.accumulate_grad_batches
        return (self.trainer.fit_loop.epoch_loop.batch_idx + 1) % accumulation == 0

    def _private_step(self, private: PrivateGradient, step: Mapping[str, Any]) -> Tensor:
        for batch in step["micro_batches"]:
            private.add(mean_nll_by_row(self.adapter.forward, batch))
        return self._nothing()

    def _nothing(self) -> Tensor:
        """Return a loss of zero whose gradient is zero: Lightning wants to go backward."""
        trained: Tensor = next(each for each in self.personal if each.requires_grad)
        return trained.sum() * 0.0

    @override
    def configure_optimizers(self) -> Optimizer:
        """Build the base optimizer: constant rate, no weight decay."""
        return build_optimizer(self.adapter, self.training_options, self.moments)

    @override
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Keep the gradients in their one flat vector instead of freeing them."""
        self.adapter.zero_grad()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Stay where the orchestrator has put the adapter (see the module's docstring)."""
        return self

    def _count(self, share: Tensor, *, first: bool) -> None:
        if first:
            self.step_losses.append(share)
        else:
            self.step_losses[-1] = self.step_losses[-1] + share


def build_optimizer(
    adapter: Adapter, training: TrainingOptions, moments: Moments | None = None
) -> Optimizer:
    """Return SGD or AdamW over the adapter's trainable parameters.

    With ``moments``, AdamW's state are views into their vectors.
    """
    trainable = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    if training.optimizer == "sgd":
        return SGD(trainable, lr=training.learning_rate)
    optimizer = AdamW(trainable, lr=training.learning_rate, weight_decay=0.0)
    if moments is not None:
        _attach(optimizer, adapter, adapter.layout, moments)
    return optimizer


def _attach(
    optimizer: Optimizer, adapter: Adapter, layout: AdapterLayout, moments: Moments
) -> None:
    matrices = zip(
        adapter.parameters(), layout.views(moments.first), layout.views(moments.second), strict=True
    )
    for parameter, (_, first), (_, second) in matrices:
        if parameter.requires_grad:
            step = torch.tensor(float(moments.step))
            optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}

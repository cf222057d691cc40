"""Logits where they are wanted, and no more of them at a time than memory should hold.

A vocabulary of 50,000 makes the head a fifth of a small model's forward, and its logits most of the
memory. Only positions that predict a supervised token have a loss, so only those go through it; and
where they are many, they go through it in parts, each with its own way back:

    part of n positions   states (n, hidden) → logits (n, vocab) → losses (n,), d loss / d states

Of a part nothing stays but its last two. That is right for a model whose logits are plainly what
its head makes of its states, which is looked at in every forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

MOST_LOGITS = 2**22
"""How many numbers the logits of a part have at most: 16 MiB in float32."""

_MORE_ON_GPU = 8
"""How many times as many elsewhere than on a CPU, where smaller parts would not fill the device."""

_BENT: WeakSet[nn.Module] = WeakSet()
"""Heads of models that were seen to do something to their logits after the head."""


def logits_at(model: Any, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Return a causal language model's logits at some positions of a batch, ``(n, vocab)``.

    Args:
        model: called with ``inputs``; its head is narrowed if it is a plain linear one.
        inputs: ``input_ids`` and others of shape ``(batch, seq)``.
        positions: ``(n,)`` int64, into the batch flattened row by row.

    What a model does to logits after its head, such as scaling them, it does to each by itself.
    """
    head = _head(model)
    narrowed = False

    def narrow(module: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor] | None:
        nonlocal narrowed
        if len(given) != 1:
            return None
        narrowed = True
        return (_chosen(given[0], positions).unsqueeze(0),)

    if head is None:
        logits: Tensor = model(**inputs).logits
    else:
        handle = head.register_forward_pre_hook(narrow)
        try:
            logits = model(**inputs).logits
        finally:
            handle.remove()
    return logits[0] if narrowed else logits.flatten(0, 1)[positions]


@dataclass(frozen=True, slots=True)
class Top:
    """The states at some positions, ``(n, hidden)``, and the frozen head above them."""

    states: Tensor
    head: nn.Linear

    def logits(self) -> Iterator[Tensor]:
        """Yield the logits part by part, in order, ``(at most so many, vocab)``."""
        for part in torch.split(self.states, _positions(self.head)):
            yield self.head(part.unsqueeze(0))[0]

    def guessed(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `nll` does, without a way back, and the first guess, int64 ``(n,)``."""
        answers = torch.split(wanted, _positions(self.head))
        losses, guesses = [], []
        for logits, due in zip(self.logits(), answers, strict=True):
            logits = logits.float()
            losses.append(F.cross_entropy(logits, due, reduction="none"))
            guesses.append(logits.argmax(dim=-1))
        return torch.cat(losses), torch.cat(guesses)

    def nll(self, wanted: Tensor) -> Tensor:
        """Return the negative log-likelihood of ``wanted``, ``(n,)`` int64; in nats, ``(n,)``.

        The way back of every part is gone before the next part begins.
        """
        nll: Tensor = _InParts.apply(self.states, self.head, wanted, _positions(self.head))  # type: ignore[no-untyped-call]
        return nll


def top_of(model: Any, inputs: Mapping[str, Any], positions: Tensor) -> Top | None:
    """Return what ``logits_at`` would send through the head; None if it need not be cut up.

    It need not be if all of the logits are few enough; and it cannot be if the model does more to
    them than its head does, or trains its head. That is seen once the model has run, so of such a
    model the first forward is in vain.
    """
    head = _head(model)
    if head is None or len(positions) <= _positions(head) or head in _BENT:
        return None
    if any(parameter.requires_grad for parameter in head.parameters()):
        return None
    states: list[Tensor] = []
    made: list[tuple[Tensor, int]] = []

    def only_first(module: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor] | None:
        if len(given) != 1:
            return None
        states.append(_chosen(given[0], positions).to(head.weight.device))
        return (states[-1][:1].unsqueeze(0),)

    def note(module: nn.Module, given: Any, logits: Tensor) -> None:
        made.append((logits, logits._version))

    handles = head.register_forward_pre_hook(only_first), head.register_forward_hook(note)
    try:
        logits = model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    if len(states) == len(made) == 1 and made[0][0] is logits and made[0][1] == logits._version:
        return Top(states[0], head)
    _BENT.add(head)
    return None


def _chosen(states: Tensor, positions: Tensor) -> Tensor:
    """Return the states ``(batch, seq, hidden)`` at some positions, where the states are."""
    return states.flatten(0, 1)[positions.to(states.device)]


def _head(model: Any) -> nn.Linear | None:
    """Return a model's head if it is a plain linear one: with an adapter it has to see all."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head if type(head) is nn.Linear else None


def _positions(head: nn.Linear) -> int:
    """Return how many positions a part has at most."""
    more = 1 if head.weight.device.type == "cpu" else _MORE_ON_GPU
    return max(1, more * MOST_LOGITS // head.out_features)


class _InParts(torch.autograd.Function):
    """Token losses from states; what goes back to them is computed on the way, part by part."""

    @staticmethod
    @override
    def forward(ctx: Any, states: Tensor, head: nn.Linear, wanted: Tensor, n: int) -> Tensor:
        trained = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        grads: list[Tensor] = []
        for part, answers in zip(torch.split(states, n), torch.split(wanted, n), strict=True):
            with torch.set_grad_enabled(trained):
                own = part.detach().requires_grad_(trained)
                logits = head(own.unsqueeze(0))[0].float()
                nll = F.cross_entropy(logits, answers, reduction="none")
                if trained:
                    grads += torch.autograd.grad(nll.sum(), own)
            losses.append(nll.detach())
            del logits, nll
        ctx.save_for_backward(*((torch.cat(grads),) if trained else ()))
        return torch.cat(losses)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (grads,) = ctx.saved_tensors
        return (grads * upstream.unsqueeze(1)).to(grads.dtype), None, None, None

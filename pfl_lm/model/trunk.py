"""The trunk: the layers below the first one with an adapter, run once for each row.

    h(x) = layer_{k-1} ( … layer_0 (embedding (x)) … )        no adapter in it: a constant of row x
    logits(x) = head ( … layer_k (h(x)) … )

With adapters in layers k and above only, every step, round, client and score that meets row x again
starts from h(x). A row's states are always made from that row alone, without padding: they do not
depend on the rows beside it, so a run that is gone on with, or spread over ranks, has them again
bit for bit. Against the plain model a batch of several rows differs in rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from pfl_lm.data.batches import Rows
from pfl_lm.layout import Entry
from pfl_lm.model.forward import replace_forward
from pfl_lm.model.states import Row, TrunkStates


class _ReachedError(Exception):
    """The top of the trunk was reached; what is above it need not run."""


class Trunk:
    """A model that starts at layer ``depth`` with remembered states; called as the model is.

    Each layer of the trunk is told to hand the states on instead of computing them; embedding,
    masks and positions are left to the model.
    """

    def __init__(self, model: Any, layers: nn.ModuleList, depth: int, states: TrunkStates) -> None:
        self.model = model
        self.depth = depth
        self.states = states
        self._given: Tensor | None = None
        self._making = False
        *lower, top = list(layers)[:depth]
        self._restore = [replace_forward(layer, self._through) for layer in lower]
        self._restore.append(replace_forward(top, partial(self._through, top=True)))

    def close(self) -> None:
        """Give the layers their own forward back."""
        for restore in self._restore:
            restore()

    def get_output_embeddings(self) -> Any:
        """Return the model's head, as the model does."""
        return self.model.get_output_embeddings()

    def __call__(
        self, *, input_ids: Tensor, attention_mask: Tensor, rows: Rows | None = None, **options: Any
    ) -> Any:
        """Run the model on rows that are padded on the right, ``(batch, seq)``.

        ``rows`` are the same without their padding. Where they are not given, the tensors are asked
        for them, which on a GPU waits for all that was asked of it before.
        """
        ids = _rows_in(input_ids, attention_mask) if rows is None else rows.ids
        with self._from(self._states(ids, input_ids.shape)):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **options)

    def _states(self, rows: Sequence[Row], shape: torch.Size) -> Tensor:
        states = [self.states.of(self.depth, row, self._made) for row in rows]
        padded = states[0].new_zeros(*shape, states[0].shape[1])
        for row, own in zip(padded, states, strict=True):
            row[: len(own)] = own
        return padded

    @torch.no_grad()
    def _made(self, row: Row) -> Tensor:
        ids = torch.tensor([row], device=self.model.device)
        self._making = True
        try:
            self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except _ReachedError as reached:
            states: Tensor = reached.args[0]
        finally:
            self._making = False
        return states[0].clone()

    @contextmanager
    def _from(self, states: Tensor) -> Iterator[None]:
        self._given = states
        try:
            yield
        finally:
            self._given = None

    def _through(self, forward: Callable[..., Any], *, top: bool = False) -> Callable[..., Any]:
        def handed_on(*given: Any, **named: Any) -> Any:
            if self._given is not None:
                return self._given
            out = forward(*given, **named)
            if self._making and top:
                raise _ReachedError(out)
            return out

        return handed_on


def _rows_in(input_ids: Tensor, attention_mask: Tensor) -> list[Row]:
    lengths = attention_mask.sum(dim=1).tolist()
    return [tuple(ids[:n]) for ids, n in zip(input_ids.tolist(), lengths, strict=True)]


def trunk_of(model: Any, adapted: Sequence[Entry], states: TrunkStates) -> Trunk | None:
    """Return a model's trunk below the matrices ``adapted``; None if it has none that can be used.

    It can be if all of them lie in the model's one list of layers, above the first; nothing in the
    model is random while it trains; and a row by itself gives the same logits to the bit, rows that
    share a batch the same but for rounding.
    """
    layers, depth = _below(model, adapted)
    if layers is None or depth < 1:
        return None
    trunk = Trunk(model, layers, depth, states)
    try:
        if _agrees(trunk):
            return trunk
    except (TypeError, AttributeError, IndexError, RuntimeError, ValueError):
        pass  # its layers take or return something else
    trunk.close()
    return None


def bytes_of_states(model: Any, adapted: Sequence[Entry], n_tokens: int) -> int:
    """Return what the states of rows of ``n_tokens`` in all take; 0 if there is no trunk."""
    _, depth = _below(model, adapted)
    if depth < 1:
        return 0
    states: Tensor = model.get_input_embeddings().weight
    return n_tokens * states.shape[1] * states.dtype.itemsize


def _below(model: Any, adapted: Sequence[Entry]) -> tuple[nn.ModuleList | None, int]:
    """Return a model's layers, and how many of them lie below all adapted matrices."""
    name, layers = layers_of(model)
    if layers is None or not all(entry.module.startswith(f"{name}.") for entry in adapted):
        return None, 0
    depth = min((entry.layer or 0 for entry in adapted), default=0)
    return layers, 0 if _is_random(model, layers[:depth]) else depth


def layers_of(model: Any) -> tuple[str, nn.ModuleList | None]:
    """Return the name of the list with as many modules as the model says it has layers.

    A list within a numbered module is none: what stands in it, an `Entry` would count elsewhere.
    """
    n = getattr(model.config, "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n
        and not any(part.isdigit() for part in name.split("."))
    ]
    return found[0] if len(found) == 1 else ("", None)


def _is_random(model: Any, layers: Iterable[nn.Module]) -> bool:
    """Whether a forward of the frozen model draws numbers while it trains."""
    rates = [value for key, value in model.config.to_dict().items() if "drop" in key]
    modules = (module for layer in layers for module in layer.modules())
    rates += [module.p for module in modules if isinstance(module, _DropoutNd)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


@torch.no_grad()
def _agrees(trunk: Trunk) -> bool:
    model = trunk.model
    probe = TrunkStates()
    kept, trunk.states = trunk.states, probe
    ids = torch.arange(1, 15, device=model.device).reshape(2, 7) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    try:
        alone = {"input_ids": ids[:1], "attention_mask": mask[:1], "use_cache": False}
        together = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        same = torch.equal(trunk(**alone).logits, model(**alone).logits)
        found, wanted = trunk(**together).logits, model(**together).logits
    finally:
        trunk.states = kept
    real = mask.bool()
    scale = float(wanted[real].abs().max())
    loose = 1e-4 if wanted.dtype == torch.float32 else 5e-2
    return same and bool(torch.isclose(found[real], wanted[real], rtol=0, atol=loose * scale).all())

"""The trunk: the layers below the first one with an adapter, run once for each row.

    h(x) = layer_{k-1} ( … layer_0 (embedding (x)) … )        no adapter in it: a constant of row x
    logits(x) = head ( … layer_k (h(x)) … )

With adapters in layers k and above only, every step, round, client and score that meets row x again
starts from h(x). A row's states are always made from that row alone, without padding: they do not
depend on the rows beside it, so a run that is gone on with, or spread over ranks, has them again
bit for bit. Against the plain model a batch of several rows differs in rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOST_BYTES = 2**30
"""How much is remembered; beyond it, what was made first is forgotten first."""

Row = tuple[int, ...]


class _ReachedError(Exception):
    """The top of the trunk was reached; what is above it need not run."""


class TrunkStates:
    """The states that were made, by row: ``(tokens, hidden)`` in the backbone's dtype.

    They are of one backbone, on its device; ``depth`` is the number of layers they have gone
    through, and another depth forgets them all.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.depth = 0
        self.n_bytes = 0
        self._of: dict[Row, Tensor] = {}

    def of(self, depth: int, row: Row, make: Callable[[Row], Tensor]) -> Tensor:
        """Return a row's states, made now if they are not there."""
        if depth != self.depth:
            self._of.clear()
            self.depth, self.n_bytes = depth, 0
        found = self._of.get(row)
        if found is None:
            found = make(row)
            self._of[row] = found
            self.n_bytes += found.nbytes
            while self.n_bytes > self.most_bytes and len(self._of) > 1:
                self.n_bytes -= self._of.pop(next(iter(self._of))).nbytes
        return found


class Trunk:
    """A model that starts at layer ``depth`` with remembered states; called as the model is.

    Each layer of the trunk is told to hand the states on instead of computing them; embedding,
    masks and positions are left to the model.
    """

    def __init__(self, model: Any, layers: nn.ModuleList, depth: int, states: TrunkStates) -> None:
        self.model = model
        self.depth = depth
        self.states = states
        self._layers = list(layers)[:depth]
        self._given: Tensor | None = None
        self._making = False
        for i, layer in enumerate(self._layers):
            layer.forward = self._through(layer.forward, top=i == depth - 1)

    def close(self) -> None:
        """Give the layers their own forward back."""
        for layer in self._layers:
            del layer.forward

    def get_output_embeddings(self) -> Any:
        """Return the model's head, as the model does."""
        return self.model.get_output_embeddings()

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Run the model on rows that are padded on the right, ``(batch, seq)``."""
        with self._from(self._states(input_ids, attention_mask)):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **options)

    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        lengths = attention_mask.sum(dim=1).tolist()
        rows = [tuple(ids[:n]) for ids, n in zip(input_ids.tolist(), lengths, strict=True)]
        states = [self.states.of(self.depth, row, self._made) for row in rows]
        padded = states[0].new_zeros(*input_ids.shape, states[0].shape[1])
        for row, own in zip(padded, states, strict=True):
            row[: len(own)] = own
        return padded

    @torch.no_grad()
    def _made(self, row: Row) -> Tensor:
        ids = torch.tensor([row], device=self.model.device)
        training = self.model.training
        self._making = True
        try:
            self.model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except _ReachedError as reached:
            states: Tensor = reached.args[0]
        finally:
            self._making = False
            self.model.train(training)
        return states[0].clone()

    @contextmanager
    def _from(self, states: Tensor) -> Iterator[None]:
        self._given = states
        try:
            yield
        finally:
            self._given = None

    def _through(self, forward: Callable[..., Any], *, top: bool) -> Callable[..., Any]:
        def handed_on(*given: Any, **named: Any) -> Any:
            if self._given is not None:
                return self._given
            out = forward(*given, **named)
            if self._making and top:
                raise _ReachedError(out)
            return out

        return handed_on


def trunk_of(model: Any, adapted: Iterable[str], states: TrunkStates) -> Trunk | None:
    """Return a model's trunk below the modules ``adapted``; None if it has none that can be used.

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


def bytes_remembered(model: Any, adapted: Iterable[str], n_tokens: int) -> int:
    """Return what the states of rows of ``n_tokens`` in all would take, at most `MOST_BYTES`."""
    _, depth = _below(model, adapted)
    if depth < 1:
        return 0
    states: Tensor = model.get_input_embeddings().weight
    return min(MOST_BYTES, n_tokens * states.shape[1] * states.dtype.itemsize)


def _below(model: Any, adapted: Iterable[str]) -> tuple[nn.ModuleList | None, int]:
    """Return a model's layers, and how many of them lie below all adapted modules."""
    name, layers = _layers(model)
    depth = min((_index(module, name) for module in adapted), default=0)
    return layers, 0 if depth and _is_random(model) else depth


def _layers(model: Any) -> tuple[str, nn.ModuleList | None]:
    """Return the name of the list with as many modules as the model says it has layers."""
    n = getattr(model.config, "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n
    ]
    return found[0] if len(found) == 1 else ("", None)


def _index(module: str, layers: str) -> int:
    """Return which layer a module lies in; 0, below which there is no trunk, if in none."""
    if not layers or not module.startswith(f"{layers}."):
        return 0
    return int(module[len(layers) + 1 :].split(".")[0])


def _is_random(model: Any) -> bool:
    """Whether a forward of the frozen model draws numbers while it trains."""
    rates = (value for key, value in model.config.to_dict().items() if "drop" in key)
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

"""What methods share whose clients' adapters differ in rank and modules.

The server's adapter has room for every client's. A client has of it the first r_k rows of each A
and the first r_k columns of each B, of its own modules: its vectors are those slices and nothing
else, and so is what it sends and is sent. Beside a larger adapter it is one filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pfl_lm.errors import AggregationError
from pfl_lm.layout import AdapterLayout, Vector
from pfl_lm.methods.aggregate import Weighted, checked
from pfl_lm.methods.base import Broadcast

if TYPE_CHECKING:
    from pfl_lm.methods.base import ServerState, Setup, Upload


def cut_for(setup: Setup, server: ServerState, client_id: str) -> Broadcast:
    """Return as much of the shared adapter as a client has room for."""
    own = setup.layout_of(client_id)
    return Broadcast({"global_weights": setup.layout.taken(server.vectors["global_weights"], own)})


@dataclass(frozen=True, slots=True)
class Filled:
    """Every upload's ``weights``, filled up with zeros to ``(d,)``, and what it weighs.

    Each pass reads the uploads anew, one at a time, and notes their own layouts in ``owns``.
    """

    setup: Setup
    uploads: Sequence[Upload]
    weights: Sequence[float]
    owns: list[AdapterLayout] = field(default_factory=list)

    def __len__(self) -> int:
        """Return how many uploads there are."""
        return len(self.uploads)

    def __iter__(self) -> Iterator[Weighted]:
        """Yield one upload's vector and weight after the other."""
        for (own, vector), weight in zip(
            own_vectors(self.setup, self.uploads), self.weights, strict=True
        ):
            self.owns.append(own)
            fits = vector.shape == (own.d,)  # where it does not, `checked` will say so
            yield (self.setup.layout.filled(vector, own) if fits else vector), weight


def own_vectors(setup: Setup, uploads: Sequence[Upload]) -> Iterator[tuple[AdapterLayout, Vector]]:
    """Yield each upload's ``weights`` as they were sent, with their layout.

    Raises:
        AggregationError: an upload has no weights.
    """
    for upload in uploads:
        if "weights" not in upload.vectors:
            raise AggregationError("an upload has no vector 'weights'")
        yield setup.layout_of(upload.client), upload.vectors["weights"]


def effect(layout: AdapterLayout, vector: Vector) -> float:
    """Return ‖B A‖ in the Frobenius norm, over all modules, without forming any B A.

    ‖B A‖² = tr(BᵀB A Aᵀ).
    """
    named = layout.split(vector.double())
    squares = [
        (named[b.name].T @ named[b.name] * (named[a.name] @ named[a.name].T)).sum()
        for a, b in layout.pairs
    ]
    return float(torch.stack(squares).sum().clamp(min=0).sqrt()) if squares else 0.0


def mean_of_known(
    setup: Setup, before: Vector, uploads: Sequence[Upload], weights: Sequence[float]
) -> Vector:
    """Return Σ p_k x_k in fp32, x_k filled up with zeros within the modules that client k adapts.

    The p_k of a module are those of the clients that adapt it, and sum to 1. What no upload has,
    be it a module or the last rows and columns, stays as it was: nobody has said anything of it,
    and zeros in both factors could never be trained again.

    Raises:
        AggregationError: the uploads do not fit together, are not finite, or weigh nothing.
    """
    layout = setup.layout
    total = torch.zeros_like(before, dtype=torch.float64)
    weight_of = torch.zeros_like(total)
    known = torch.zeros_like(before, dtype=torch.bool)
    owns = list[AdapterLayout]()
    for vector, weight in checked(Filled(setup, uploads, weights, owns), before):
        total.add_(vector.to(torch.float64), alpha=weight)
        in_modules, has = _places(layout, owns[-1])
        weight_of.add_(in_modules.to(before.device), alpha=weight)
        known |= has.to(before.device)
    mean = total.div_(weight_of).to(torch.float32)
    return torch.where(known & (weight_of > 0), mean, before)


def _places(layout: AdapterLayout, own: AdapterLayout) -> tuple[Vector, torch.Tensor]:
    """Return ``(d,)`` twice: 1 on all of the modules that ``own`` has, true on what it has."""
    if own == layout:
        whole = torch.ones(layout.d, dtype=torch.float64)
        return whole, whole.bool()
    modules = {entry.module for entry in own.entries}
    in_modules = torch.zeros(layout.d, dtype=torch.float64)
    for entry in layout.entries:
        if entry.module in modules:
            in_modules[entry.start : entry.stop] = 1.0
    return in_modules, layout.where(own)

"""The pure averages that methods share.

Sums are taken in float64, in the order given (client-id order by contract), and rounded to fp32
once. Equal vectors therefore average to themselves, bit for bit, whatever the weights.

What is averaged comes one vector at a time and is not kept: uploads may be read from disk as they
are asked for. At most two of them are in memory, the one at hand and the one being read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch

from pfl_lm.errors import AggregationError
from pfl_lm.layout import Vector

if TYPE_CHECKING:
    from pfl_lm.methods.base import LocalRun, Upload

Weighting = Literal["examples", "tokens", "uniform"]
Weighted = tuple[Vector, float]
"""A ``(d,)`` vector and what it weighs."""


class WeightedVectors(Protocol):
    """Vectors with their weights, so many, to be gone through as often as needed: a list is one."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __iter__(self) -> Iterator[Weighted]:
        """Begin anew."""
        ...


MOST_TOLD = 5
"""How many uploads an error describes one by one."""


def upload_weight(weighting: Weighting, run: LocalRun) -> float:
    """Return what a client weighs in averages: its train rows, their supervised tokens, or 1."""
    match weighting:
        case "examples":
            return run.n_examples
        case "tokens":
            return run.n_tokens
        case "uniform":
            return 1


@dataclass(frozen=True, slots=True)
class Sent:
    """One vector of every upload, with its weight. Each pass over it reads the uploads anew."""

    uploads: Sequence[Upload]
    name: str

    def __len__(self) -> int:
        """Return how many uploads there are."""
        return len(self.uploads)

    def __iter__(self) -> Iterator[Weighted]:
        """Yield one upload's vector and weight after the other.

        Raises:
            AggregationError: an upload has no such vector.
        """
        for upload in self.uploads:
            if self.name not in upload.vectors:
                raise AggregationError(f"an upload has no vector {self.name!r}")
            yield upload.vectors[self.name], upload.weight


@runtime_checkable
class InParts(Protocol):
    """Uploads of which a part can be read alone."""

    def part(self, index: int, name: str, columns: slice) -> Vector:
        """Return some numbers of one upload's vector; nothing but their number is checked."""
        ...


def in_columns(weighted: WeightedVectors, columns: slice) -> Iterator[Vector]:
    """Yield some numbers of every vector, and read no others where they need not be.

    What comes was not checked: whoever asks has seen the whole before, and compares.
    """
    if isinstance(weighted, Sent) and isinstance(weighted.uploads, InParts):
        for index in range(len(weighted)):
            yield weighted.uploads.part(index, weighted.name, columns)
    else:
        for vector, _ in weighted:
            yield vector[columns]


def mean_upload(uploads: Sequence[Upload], name: str) -> Vector:
    """Return the weighted mean of one vector of every upload.

    Raises:
        AggregationError: as `weighted_mean`.
    """
    return weighted_mean(Sent(uploads, name))


def weighted_mean(weighted: Iterable[Weighted]) -> Vector:
    """Return Σ n_k w_k / Σ n_k over ``(d,)`` vectors, in fp32, in one pass.

    Raises:
        AggregationError: as `checked`.
    """
    total, weights = torch.zeros(0), list[float]()
    for vector, weight in checked(weighted):
        if not weights:
            total = torch.zeros_like(vector, dtype=torch.float64)
        total.add_(vector.to(torch.float64), alpha=weight)
        weights.append(weight)
    return total.div_(math.fsum(weights)).to(torch.float32)


def checked(weighted: Iterable[Weighted], like: Vector | None = None) -> Iterator[Weighted]:
    """Yield the vectors and weights that come, and refuse them after the last.

    A vector of another shape than the first, or than ``like``, is kept back: what is done with
    those that come cannot fail over it.

    Raises:
        AggregationError: there are none, their lengths differ, a weight is negative or not finite,
            all weights are zero, or a number of a vector is not finite.
    """
    shapes: list[tuple[int, ...]] = []
    weights: list[float] = []
    broken: list[str] = []
    for vector, weight in weighted:
        shapes.append(tuple(vector.shape))
        weights.append(weight)
        if not torch.isfinite(vector).all():
            broken.append(_not_finite(len(shapes), vector))
        if shapes[-1] == (shapes[0] if like is None else tuple(like.shape)):
            yield vector, weight
    if not shapes:
        raise AggregationError("cannot average 0 vectors with 0 weights")
    if len(set(shapes)) != 1:
        raise AggregationError(f"cannot average vectors of different shapes: {shapes}")
    if like is not None and shapes[0] != tuple(like.shape):
        raise AggregationError(
            f"cannot average vectors of shape {shapes[0]} from weights of shape {tuple(like.shape)}"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise AggregationError(f"weights must be finite, >= 0 and not all zero: {weights}")
    if broken:
        more = [f"and {len(broken) - MOST_TOLD} more"] if len(broken) > MOST_TOLD else []
        told = "; ".join([*broken[:MOST_TOLD], *more])
        raise AggregationError(f"uploads, here in the order of client ids, must be finite: {told}")


def _not_finite(position: int, vector: Vector) -> str:
    numbers = vector.reshape(-1)
    bad = torch.nonzero(~torch.isfinite(numbers)).reshape(-1)
    first = int(bad[0])
    said = f"the first is {float(numbers[first])} at {first}"
    return f"{len(bad)} of {len(numbers)} numbers of upload {position} are not, {said}"

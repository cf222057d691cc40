"""How an adapter's tensors lie in one flat vector.

    vector  (d,)   [ layer 0 q_proj A | layer 0 q_proj B | layer 0 v_proj A | … ]

Every rule of every method is algebra over such vectors. The layout says which slice is which
tensor, which A belongs to which B, and nothing about where the names came from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Factor = Literal["A", "B"]
Vector = Tensor
"""All trainable numbers of one adapter, fp32, shape ``(d,)``."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One LoRA matrix: the module it adapts, which factor it is, and where it lies.

    A tensor of a new head, ``head``, is trained whole. It counts as B: what it adds is zero at
    first, and goes where B goes; ``module`` is then its own name.
    """

    module: str
    factor: Factor
    shape: tuple[int, ...]
    start: int
    head: bool = False

    @property
    def name(self) -> str:
        """The key of this matrix in named tensors: ``<module>.<factor>``."""
        return f"{self.module}.{self.factor}"

    @property
    def stop(self) -> int:
        """One past the last position of this matrix in the vector."""
        return self.start + math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        """The transformer layer it is in; None if none."""
        return layer_of(self.module)


def layer_of(module: str) -> int | None:
    """Return the transformer layer a module is in, the first number in its path; None if none."""
    parts = module.split(".")
    return next((int(part) for part in parts if part.isascii() and part.isdigit()), None)


def _narrowed(entry: Entry, r: int) -> tuple[int, ...]:
    rows, columns = entry.shape
    return (min(r, rows), columns) if entry.factor == "A" else (rows, min(r, columns))


@dataclass(frozen=True)
class AdapterLayout:
    """The order and shapes of an adapter's matrices. Immutable and comparable."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(
        cls,
        matrices: Iterable[tuple[str, Factor, tuple[int, ...]]],
        head: Iterable[tuple[str, tuple[int, ...]]] = (),
    ) -> AdapterLayout:
        """Lay the matrices out one after another, in the order given, and a head behind them.

        Raises:
            ValueError: a matrix is named twice.
        """
        entries: list[Entry] = []
        start = 0
        for module, factor, shape in matrices:
            entries.append(Entry(module, factor, tuple(shape), start))
            start = entries[-1].stop
        for name, shape in head:
            entries.append(Entry(name, "B", tuple(shape), start, head=True))
            start = entries[-1].stop
        if len({entry.name for entry in entries}) != len(entries):
            raise ValueError("a matrix is named twice in one layout")
        return cls(tuple(entries))

    @cached_property
    def d(self) -> int:
        """How many numbers the vector holds."""
        return self.entries[-1].stop if self.entries else 0

    @cached_property
    def head(self) -> slice:
        """Where a new head lies, behind all matrices; empty if there is none."""
        return slice(next((e.start for e in self.entries if e.head), self.d), self.d)

    @cached_property
    def pairs(self) -> tuple[tuple[Entry, Entry], ...]:
        """The (A, B) entries of each adapted module."""
        by_name = {entry.name: entry for entry in self.entries}
        return tuple((e, by_name[f"{e.module}.B"]) for e in self.entries if e.factor == "A")

    @cached_property
    def layers(self) -> dict[int | None, tuple[slice, ...]]:
        """Where the numbers of each transformer layer lie; neighbours share a slice."""
        found: dict[int | None, list[slice]] = {}
        for entry in self.entries:
            of_layer = found.setdefault(entry.layer, [])
            start = entry.start
            if of_layer and of_layer[-1].stop == start:
                start = of_layer.pop().start
            of_layer.append(slice(start, entry.stop))
        return {layer: tuple(slices) for layer, slices in found.items()}

    def narrowed(self, r: int, modules: Collection[str]) -> AdapterLayout:
        """Return the layout of an adapter of rank ``r`` at most, on these modules alone.

        A module is named by the end of its path, as PEFT has it: ``q_proj`` is every layer's.
        """
        return AdapterLayout.of(
            (entry.module, entry.factor, _narrowed(entry, r))
            for entry in self.entries
            if any(entry.module == name or entry.module.endswith(f".{name}") for name in modules)
        )

    def where(self, own: AdapterLayout) -> Tensor:
        """Return ``(d,)``: true where a number of this layout is one of ``own``, a narrowed one.

        Those are the first rows of each A and the first columns of each B, and taken in this order
        they are a vector of ``own``.
        """
        shapes = {entry.name: entry.shape for entry in own.entries}
        chosen = torch.zeros(self.d, dtype=torch.bool)
        for entry, view in self.views(chosen):
            if entry.name in shapes:
                rows, columns = shapes[entry.name]
                view[:rows, :columns] = True
        return chosen

    def taken(self, vector: Vector, own: AdapterLayout) -> Vector:
        """Return the numbers of a vector ``(d,)`` that a narrowed layout has: ``(own.d,)``."""
        return vector if own == self else vector[self.where(own).to(vector.device)]

    def filled(self, vector: Vector, own: AdapterLayout) -> Vector:
        """Return ``(d,)``: a vector of a narrowed layout, and zeros where that has no number.

        It acts as the narrow one does: a row of A and a column of B that are zero together add
        nothing to B A, nor have they a gradient, since that of either is the other's multiple.

        Raises:
            ValueError: the vector is not of ``own``.
        """
        if vector.shape != (own.d,):
            raise ValueError(f"expected a vector of shape ({own.d},), got {tuple(vector.shape)}")
        if own == self:
            return vector
        whole = vector.new_zeros(self.d)
        whole[self.where(own).to(vector.device)] = vector
        return whole

    def views(self, vector: Vector) -> Iterator[tuple[Entry, Tensor]]:
        """Yield each matrix as a view into the vector: writing to it writes to the vector.

        Raises:
            ValueError: the vector has another length.
        """
        if vector.shape != (self.d,):
            raise ValueError(f"expected a vector of shape ({self.d},), got {tuple(vector.shape)}")
        for entry in self.entries:
            yield entry, vector[entry.start : entry.stop].view(entry.shape)

    def split(self, vector: Vector) -> dict[str, Tensor]:
        """Return the matrices by name, as views into the vector."""
        return {entry.name: view for entry, view in self.views(vector)}

    def join(self, named: Mapping[str, Tensor]) -> Vector:
        """Return the flat fp32 vector of the named matrices.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        names = {entry.name for entry in self.entries}
        if names != named.keys():
            raise ValueError(f"names differ from the layout: {sorted(names ^ named.keys())}")
        for entry in self.entries:
            if tuple(named[entry.name].shape) != entry.shape:
                raise ValueError(
                    f"{entry.name}: expected shape {entry.shape}, "
                    f"got {tuple(named[entry.name].shape)}"
                )
        parts = [named[entry.name].detach().to(torch.float32).reshape(-1) for entry in self.entries]
        return torch.cat(parts) if parts else torch.zeros(0)

    def mask(self, factor: Factor, device: torch.device | str | None = None) -> Tensor:
        """Return a boolean vector ``(d,)`` that is true on every matrix of this factor."""
        chosen = torch.zeros(self.d, dtype=torch.bool, device=device)
        for entry in self.entries:
            if entry.factor == factor:
                chosen[entry.start : entry.stop] = True
        return chosen

    def factor(self, vector: Vector, factor: Factor) -> Vector:
        """Return every matrix of one factor, one after another in this order: a shorter vector."""
        return vector[self.mask(factor, vector.device)]

    def with_factor(self, vector: Vector, factor: Factor, part: Vector) -> Vector:
        """Return a copy of ``vector`` in which one factor is ``part``, laid out as by `factor`.

        Raises:
            ValueError: ``part`` has another length.
        """
        mask = self.mask(factor, vector.device)
        due = (int(mask.sum()),)
        if part.shape != due:
            raise ValueError(f"expected {factor} factors of shape {due}, got {tuple(part.shape)}")
        changed = vector.clone()
        changed[mask] = part
        return changed

    def with_head(self, vector: Vector, head: Vector) -> Vector:
        """Return a copy of ``vector`` with another head, laid out as by `head`."""
        changed = vector.clone()
        changed[self.head] = head
        return changed

    def without_effect(self, vector: Vector) -> Vector:
        """Return a copy whose B factors are zero: an adapter that leaves the backbone as it is.

        A head then says of every class the same.
        """
        return vector.masked_fill(self.mask("B", vector.device), 0.0)

    def matrix_rms(self, vector: Vector) -> Vector:
        """Return ``(d,)``: at each position, the root mean square of the matrix it belongs to."""
        rms = torch.empty_like(vector)
        for entry in self.entries:
            part = vector[entry.start : entry.stop]
            rms[entry.start : entry.stop] = part.square().mean().sqrt()
        return rms

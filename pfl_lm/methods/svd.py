"""The mean of products B A, and the best two factors of a given rank for it, in float64.

    M = Σ_k p_k B_k A_k = L R,    L = [p_1 B_1 … p_K B_K],  R = [A_1; …; A_K]
    L = Q_L T_L,  Rᵀ = Q_R T_R,    T_L T_Rᵀ = U' Σ V'ᵀ
    M = (Q_L U') Σ (Q_R V')ᵀ

So the decomposition is of a matrix as wide as all ranks together and not of M, and is exact all the
same. Where all ranks together are no less than M's own sides, M itself is summed up and decomposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pfl_lm.layout import AdapterLayout, Entry

CHUNK_BYTES = 64 * 2**20
"""How much of the uploads is held at a time, unless one module alone is more."""

NOTHING = 1e-12
"""A singular value is none if it is so small beside the largest; float64 has 16 digits."""


class MeanProduct:
    """Σ_k w_k B_k A_k / Σ_k w_k of one module, as it comes in.

    Args:
        shape: of the product, (out, in).
        width: the ranks together of all that will come.
    """

    def __init__(self, shape: tuple[int, int], width: int) -> None:
        self.shape = shape
        self.dense = width >= min(shape)
        self.weights: list[float] = []
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._sum: Tensor | None = None

    @staticmethod
    def size(shape: tuple[int, int], width: int) -> int:
        """Return how many bytes one holds when all has come in."""
        out, into = shape
        return 8 * (out * into if width >= min(shape) else width * (out + into))

    def add(self, b: Tensor, a: Tensor, weight: float) -> None:
        """Take in one client's factors; they are copied."""
        self.weights.append(weight)
        left, right = b.to(torch.float64) * weight, a.to(torch.float64, copy=True)
        if not self.dense:
            self._left.append(left)
            self._right.append(right)
        elif self._sum is None:
            self._sum = left @ right
        else:
            self._sum.addmm_(left, right)

    def write_best(self, b: Tensor, a: Tensor) -> None:
        """Write the best factors of their rank into ``b`` (out, r) and ``a`` (r, in), in place.

        Rows of ``a`` for which the mean has nothing stay, and the columns of ``b`` become zero; if
        nothing has come in, or all of it weighs nothing, all stays.
        """
        total = math.fsum(self.weights)
        if total == 0:
            return
        u, s, vt = self._decomposed()
        n = int((s > NOTHING * s[0]).sum()) if len(s) and s[0] > 0 else 0
        n = min(n, len(a))
        u, s, vt = u[:, :n], s[:n] / total, vt[:n]
        if n:
            largest = vt.abs().argmax(dim=1, keepdim=True)
            sign = vt.gather(1, largest).sign()
            vt, u = vt * sign, u * sign.T
        b.zero_()
        b[:, :n] = (u * s).to(b.dtype)
        a[:n] = vt.to(a.dtype)

    def _decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U, Σ and Vᵀ of the sum that is not divided yet."""
        if self._sum is not None:
            u, s, vt = torch.linalg.svd(self._sum, full_matrices=False)
            return u, s, vt
        q_left, t_left = torch.linalg.qr(torch.cat(self._left, dim=1))
        q_right, t_right = torch.linalg.qr(torch.cat(self._right).T)
        u, s, vt = torch.linalg.svd(t_left @ t_right.T, full_matrices=False)
        return q_left @ u, s, vt @ q_right.T


def in_chunks(
    layout: AdapterLayout, owns: Sequence[AdapterLayout], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[list[tuple[Entry, Entry, MeanProduct]]]:
    """Yield every module's A, B and an empty mean, as many at a time as may be held together.

    ``owns`` are the layouts of all whose factors will come.
    """
    some: list[tuple[Entry, Entry, MeanProduct]] = []
    held = 0
    widths = _widths(owns)
    for a, b in layout.pairs:
        shape = (b.shape[0], a.shape[1])
        width = widths.get(a.name, 0)
        n = MeanProduct.size(shape, width)
        if some and held + n > chunk_bytes:
            yield some
            some, held = [], 0
        some.append((a, b, MeanProduct(shape, width)))
        held += n
    if some:
        yield some


def _widths(owns: Sequence[AdapterLayout]) -> dict[str, int]:
    """Return the ranks of each A together, by its name."""
    found: dict[str, int] = {}
    for own in owns:
        for a, _ in own.pairs:
            found[a.name] = found.get(a.name, 0) + a.shape[0]
    return found

"""A rank's share without other ranks: what it would add up is noted instead."""

from __future__ import annotations

from torch import Tensor


class Noted:
    """Notes what a rank brings to every sum; ``whole``, if given, is what comes of the first."""

    def __init__(self, rank: int, n_ranks: int = 2, whole: float | None = None) -> None:
        self.rank = rank
        self.n_ranks = n_ranks
        self.whole = whole
        self.parts: list[Tensor] = []

    def add_up(self, tensor: Tensor) -> None:
        self.parts.append(tensor.clone())
        if self.whole is not None:
            tensor.fill_(self.whole)

    def all_have(self, mine: bool) -> bool:
        return mine

    def refuse_apart(self, what: str, *vectors: Tensor) -> None:
        pass

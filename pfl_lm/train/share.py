"""One rank's part of a turn that several ranks take together.

Each rank holds the same backbone and goes through the same steps, on its own share of every step's
rows. What it computes is a sum over rows: gradients of the token-summed loss, already divided by
the supervised tokens of all ranks' rows. So the sum of what the ranks have is what one process has
on the whole batch, however unequal the shares are, and a rank without a row adds zero.

`Adapter.grads` is one flat vector, so that one reduction a step is all there is to do. What
DistributedDataParallel has beyond it, buckets that are reduced while the backward pass goes on,
pays for gradients of gigabytes; and it would reduce after every micro-batch, or would have to be
told not to, and average where shares may be unequal.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class OtherRankFailedError(Exception):
    """Another rank has given up what all were doing together; that rank says why."""


class Share(Protocol):
    """Which part is this rank's, and how parts become a whole.

    Attributes:
        rank: from 0.
        n_ranks: how many share the work.
    """

    rank: int
    n_ranks: int

    def add_up(self, tensor: Tensor) -> None:
        """Make a tensor the sum of all ranks' in place, with the same bits on all.

        Raises:
            OtherRankFailedError: another rank has given up.
            LostRankError: another rank is gone.
        """
        ...

    def all_have(self, mine: bool) -> bool:
        """Return whether every rank says yes; raises as `add_up` does."""
        ...

    def refuse_apart(self, what: str, *vectors: Tensor) -> None:
        """Make sure that all ranks hold these numbers, bit for bit; also raises as `add_up` does.

        Raises:
            RanksApartError: they do not.
        """
        ...

"""Whether ranks take clients of their own or share each client's turn. Torch-free.

    clients   each rank takes whole turns: as good as no waiting, and the bytes of one process
    data      all ranks take each turn together, each its share of every optimizer step's rows

A round with as many clients as ranks keeps all of them busy with turns of their own. With fewer,
some would stand by, and they share.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Way = Literal["clients", "data"]


@dataclass(frozen=True, slots=True)
class Sharing:
    """What ranks share, and why, for a person; ``why`` is empty where there is one process."""

    way: Way
    n_ranks: int
    why: str = ""

    @property
    def noted(self) -> str:
        """What a run notes of itself: its last digits are the same as long as this is."""
        return self.way if self.way == "clients" else f"data on {self.n_ranks} ranks"


def sharing(
    asked: Literal["auto", "clients", "data"],
    n_ranks: int,
    cohorts: Sequence[int],
    begun: str | None = None,
    *,
    rows: bool = True,
) -> Sharing:
    """Return what ranks share in a run.

    Args:
        asked: ``runtime.parallel``.
        n_ranks: how many there are.
        cohorts: how many clients train in each round.
        rows: whether they can share a client's rows at all.
        begun: what a run that is gone on with has noted of itself; ``auto`` keeps to it.
    """
    if n_ranks == 1:
        return Sharing("clients", 1)
    way: Way = "clients" if _typical(cohorts) >= n_ranks or not rows else "data"
    why = _because(cohorts, n_ranks) if rows else "rows are shared for causal_lm only"
    if asked != "auto":
        way, why = asked, "as the recipe says"
    elif begun is not None:
        way, why = ("data" if begun.startswith("data") else "clients"), "as this run has begun"
    what = "take clients of their own" if way == "clients" else "share each client's turn"
    return Sharing(way, n_ranks, f"{n_ranks} ranks {what} (runtime.parallel: {asked}): {why}")


def planned(
    asked: Literal["auto", "clients", "data"],
    n_ranks: int,
    cohorts: Sequence[int],
    *,
    rows: bool = True,
) -> str:
    """Return what a plan says of ranks, be there any or not; arguments as of `sharing`."""
    if n_ranks > 1:
        return sharing(asked, n_ranks, cohorts, rows=rows).why
    if asked != "auto":
        return f"this is one process, and runtime.parallel: {asked} needs several"
    most = _typical(cohorts)
    if not rows:
        return f"up to {most} ranks would take clients of their own"
    alone = "2 ranks or more" if most < 2 else f"more than {most} ranks"
    share = f"{alone} would share each client's turn"
    if most < 2:
        return share
    return f"up to {most} ranks would take clients of their own, {share}"


def _because(cohorts: Sequence[int], n_ranks: int) -> str:
    n = _typical(cohorts)
    clients = "1 client" if n == 1 else f"{n} clients"
    told = "enough for all" if n >= n_ranks else "fewer than ranks"
    return f"a round has {clients}, {told}"


def _typical(cohorts: Sequence[int]) -> int:
    return statistics.median_low(cohorts)

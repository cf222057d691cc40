"""What was measured, and what follows from it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from pfl_lm.bench.clock import Times


@dataclass
class Result:
    """One way of taking the turn, measured.

    Attributes:
        turn: whole turns.
        step: one optimizer step of a turn, on average.
        fixed: a turn less its steps.
        n_steps: optimizer steps of a turn.
        flops: floating-point operations of a turn's steps.
        up, down: bytes of tensors sent and received in a turn; None where nothing is sent.
        apart: how far from the fit it ended, as a share of the way the fit went; None where that
            means nothing.
        peak: the most bytes held while turns were taken; None if not measured.
    """

    flops: int
    turn: Times = field(default_factory=Times)
    step: Times = field(default_factory=Times)
    fixed: Times = field(default_factory=Times)
    n_steps: int = 0
    up: int | None = None
    down: int | None = None
    apart: float | None = None
    peak: int | None = None

    def seconds(self, by: str) -> float:
        """Return the median of a turn, ``by`` wall or cpu."""
        return statistics.median(self.turn.cpu if by == "cpu" else self.turn.wall) / 1e3


@dataclass(frozen=True)
class Bench:
    """Everything that was measured of one case.

    Attributes:
        by: the clock that ratios are taken by: cpu on one CPU thread, else wall.
        rate: operations a second of a large matrix product, by ``by``.
        same_bits: whether the fit and the loop with its loss ended at the same bits; None if either
            was not asked for.
        about: of what, and on which machine.
    """

    by: str
    rate: float
    n_tokens: int
    same_bits: bool | None
    ways: dict[str, Result]
    about: dict[str, Any]

    def ratio(self, name: str, to: str, by: str | None = None) -> float:
        """Return how many times as long a turn takes one way as another, by medians."""
        by = by or self.by
        return self.ways[name].seconds(by) / self.ways[to].seconds(by)

    def share(self, name: str) -> float:
        """Return what part of the machine's rate the whole turn came to."""
        result = self.ways[name]
        return result.flops / result.seconds(self.by) / self.rate

    def turns_per_hour(self, name: str) -> float:
        """Return how many turns an hour of the wall's clock holds."""
        return 3600 / self.ways[name].seconds("wall")

    def tokens_per_second(self, name: str) -> float:
        """Return the rows' own tokens, padding aside, a second of the wall's clock."""
        return self.n_tokens / self.ways[name].seconds("wall")

    def to_json(self, ours: str) -> dict[str, Any]:
        """Return everything as JSON has it; ratios are to the way called ``ours``."""
        return {
            **self.about,
            "ratios_by": self.by,
            "matmul_flops_per_second": self.rate,
            "tokens": self.n_tokens,
            "fit_ends_at_the_loops_bits": self.same_bits,
            "ways": {name: self._way(name, ours) for name in self.ways},
        }

    def _way(self, name: str, ours: str) -> dict[str, Any]:
        result = self.ways[name]
        return {
            "turns_per_hour": self.turns_per_hour(name),
            "tokens_per_second": self.tokens_per_second(name),
            "turn_ms": result.turn.numbers,
            "step_ms": result.step.numbers,
            "fixed_ms": result.fixed.numbers,
            "steps": result.n_steps,
            "ratio": {by: self.ratio(name, ours, by) for by in ("wall", "cpu")},
            "flops": result.flops,
            "share_of_matmul": self.share(name),
            "bytes_up": result.up,
            "bytes_down": result.down,
            "distance_from_fit": result.apart,
            "peak_bytes": result.peak,
            "all": {"wall_ms": result.turn.wall, "cpu_ms": result.turn.cpu},
        }

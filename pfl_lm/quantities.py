"""What a diagnosed turn tells of each layer: the names of its numbers in the turn's summary.

They are ``diagnostics/<quantity>/<layer>``. A layer is a number; ``all`` is the whole adapter, and
``rest`` are matrices that are in no numbered layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

QUANTITIES = (
    "preconditioner_mean",
    "gamma_mean",
    "gamma_std",
    "offset_norm",
    "gradient_variance",
    "update_variance",
    "step_variance",
    "cosine",
    "drift",
)
"""What there is to tell, in the order of a table."""

WHOLE, REST = "all", "rest"
"""The whole adapter; and matrices that are in no numbered layer."""

_FIRST = "diagnostics/"
_KEY = re.compile(rf"{_FIRST}({'|'.join(QUANTITIES)})/({WHOLE}|{REST}|0|[1-9]\d{{0,5}})", re.ASCII)


def key(quantity: str, layer: str) -> str:
    """Return the name of a number in a turn's summary."""
    return f"{_FIRST}{quantity}/{layer}"


def told(summary: Mapping[str, float]) -> Iterator[tuple[str, str, float]]:
    """Yield (layer, quantity, value) of a summary's diagnostics, the whole adapter first.

    A summary may come from a stranger's ledger: what is no quantity of ours, or not finite, is
    passed over.
    """
    found = []
    for name, value in summary.items():
        match = _KEY.fullmatch(name)
        number = _finite(value) if match else None
        if match and number is not None:
            found.append((match[2], match[1], number))
    yield from sorted(found, key=lambda each: (order(each[0]), QUANTITIES.index(each[1])))


def order(layer: str) -> tuple[int, int]:
    """Return what layers are sorted by: the whole adapter, the numbered layers, the rest."""
    return {WHOLE: (0, 0), REST: (2, 0)}.get(layer) or (1, int(layer))


def without_layers(summary: Mapping[str, float]) -> dict[str, float]:
    """Return a summary without the numbers of single layers; those of the whole adapter stay."""
    return {
        name: value
        for name, value in summary.items()
        if not name.startswith(_FIRST) or name.endswith(f"/{WHOLE}")
    }


def _finite(value: float) -> float | None:
    try:
        number = float(value)
    except OverflowError:  # JSON has integers of any size
        return None
    return number if math.isfinite(number) else None

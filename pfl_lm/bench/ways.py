"""The ways of taking a turn that are set side by side, each importing what it needs and no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from pfl_lm.bench.case import Case, Did
from pfl_lm.bench.clock import Stopwatch
from pfl_lm.errors import PflError
from pfl_lm.model.states import TrunkStates
from pfl_lm.recipe.nearest import nearest

AGAINST = ("loop", "trainer", "reload")
"""What may be asked for beside pfl-lm itself."""

OURS = "pfl-lm"
FIT = "fit"
SAME_LOOP = "loop, same loss"

Opened = AbstractContextManager[Callable[[], Did]]


@dataclass(frozen=True, slots=True)
class Way:
    """One way of taking the turn.

    Attributes:
        name: what it is called in tables and files.
        open: puts the adapter in; gives what takes the turn; takes the adapter out.
        trunk: whether the layers below the adapter are remembered.
        everywhere: whether every position gets logits.
        all_layers: whether the adapter is in every layer.
        whole: whether it is a method's whole turn, which may be several fits.
        resident: whether it works on the backbone that is loaded.
    """

    name: str
    open: Callable[[Case, Stopwatch], Opened]
    trunk: bool = False
    everywhere: bool = False
    all_layers: bool = False
    whole: bool = False
    resident: bool = True


def asked_ways(case: Case, against: Sequence[str]) -> list[Way]:
    """Return pfl-lm's ways, then those it is set against, without what would be the same twice."""
    remembers = case.trunk is not None
    ways = [Way(OURS, _turn_as_it_is, trunk=remembers, whole=True)]
    if remembers:
        ways.append(Way("pfl-lm, rows new", _turn_anew, whole=True))
        ways.append(Way("pfl-lm, no trunk", _turn_without_trunk, whole=True))
    if "loop" in against:
        ways.append(Way(FIT, _fit, trunk=remembers))
        ways.append(Way(SAME_LOOP, _same_loop, trunk=remembers))
        ways.append(Way("loop", _loop, everywhere=True))
        if case.recipe.adapter.layers_to_transform is not None:
            ways.append(Way("loop, all layers", _loop_all, everywhere=True, all_layers=True))
    if "trainer" in against:
        ways.append(Way("trainer", _trainer, everywhere=True))
    if "reload" in against:
        ways.append(Way("reload", _reload, everywhere=True, resident=False))
    return ways


def read_against(given: Sequence[str]) -> list[str]:
    """Return what is asked for by ``--against A,B``; everything if nothing is.

    Raises:
        PflError: one of them is unknown.
    """
    names = [name.strip() for text in given for name in text.split(",")] or list(AGAINST)
    for name in names:
        if name not in AGAINST:
            raise PflError(
                f"--against: {name!r} is none of {', '.join(AGAINST)}",
                hint=f"--against {nearest(name, AGAINST) or AGAINST[0]}",
            )
    return names


def _turn_as_it_is(case: Case, steps: Stopwatch) -> Opened:
    from pfl_lm.bench.turns import turn

    return turn(case, steps, trunk=case.trunk)


def _turn_anew(case: Case, steps: Stopwatch) -> Opened:
    from pfl_lm.bench.turns import turn

    return turn(case, steps, trunk=TrunkStates())


def _turn_without_trunk(case: Case, steps: Stopwatch) -> Opened:
    from pfl_lm.bench.turns import turn

    return turn(case, steps, trunk=None)


def _fit(case: Case, steps: Stopwatch) -> Opened:
    from pfl_lm.bench.turns import fit

    return fit(case, steps)


def _same_loop(case: Case, steps: Stopwatch) -> Opened:
    from pfl_lm.bench.loops import same_loop

    return same_loop(case, steps)


def _loop(case: Case, steps: Stopwatch) -> Opened:
    from pfl_lm.bench.loops import loop

    return loop(case, steps)


def _loop_all(case: Case, steps: Stopwatch) -> Opened:
    from pfl_lm.bench.loops import loop

    return loop(case, steps, all_layers=True)


def _trainer(case: Case, steps: Stopwatch) -> Opened:
    from pfl_lm.bench.stock import trainer

    return trainer(case, steps)


def _reload(case: Case, steps: Stopwatch) -> Opened:
    from pfl_lm.bench.stock import reload

    return reload(case, steps)

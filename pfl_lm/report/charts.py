"""What a comparison looks like: how each method learns, and whom it helps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pfl_lm.evaluate.standings import Standing, Standings, by_client
from pfl_lm.report import figure as inks
from pfl_lm.report.standings_text import loss, printable, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float64]

WIDTH = 10.0
"""Of every figure, in inches."""

_PANELS = 4
_MOST_TIPS = 2000


def curves(found: Standings) -> str:
    """Draw the validation loss by round: a panel a method, the others faint behind it.

    The loss is of the method's own candidate, a mean over clients; lines are means over seeds, and
    bands reach from the lowest seed to the highest.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in found.methods if row.outcomes]
    tables = [_curve(row) for row in rows]
    n_lines = math.ceil(len(rows) / _PANELS)
    with matplotlib.rc_context(inks.SETTINGS):
        drawn = Figure(figsize=(WIDTH, 0.35 + 2.0 * n_lines), layout="constrained")
        grid = drawn.subplots(n_lines, _PANELS, sharex=True, sharey=True, squeeze=False)
        panels = list(grid.flat)
        for panel, row, (rounds, values) in zip(panels, rows, tables, strict=False):
            for other, theirs in tables:
                panel.plot(other, theirs.mean(axis=0), color=inks.RULE, linewidth=0.8)
            panel.fill_between(
                rounds, values.min(axis=0), values.max(axis=0), color=inks.ACCENT, alpha=0.25, lw=0
            )
            panel.plot(rounds, values.mean(axis=0), color=inks.ACCENT, linewidth=1.8)
            panel.set_title(row.label, loc="left")
            panel.locator_params(axis="x", integer=True, nbins=5)
            panel.locator_params(axis="y", nbins=5)
        for i, panel in enumerate(panels):
            panel.set_visible(i < len(rows))
            if i + _PANELS >= len(rows):
                panel.set_xlabel("round")
                panel.tick_params(labelbottom=True)
            if i % _PANELS == 0:
                panel.set_ylabel("validation loss")
        ends = (
            f"{row.label} {loss(float(values[:, -1].mean()))}"
            for row, (_, values) in zip(rows, tables, strict=True)
        )
        return inks.inline_svg(
            drawn,
            "curves",
            "Validation loss by round, one panel a method",
            f"After the last round: {', '.join(ends)}.",
        )


def _curve(row: Standing) -> tuple[Array, Array]:
    """Return the rounds and the loss after each, (seeds, rounds), of rounds that all seeds have."""
    by_seed = [dict(outcome.curve) for outcome in row.outcomes]
    rounds = sorted(set.intersection(*(set(each) for each in by_seed)))
    return np.array(rounds, dtype=float), np.array([[c[r] for r in rounds] for c in by_seed])


def clients(found: Standings) -> str:
    """Draw whom each method helps and harms: a dot a client, against local training and the base.

    A dot is a client's loss minus that of the other model, a mean over the seeds both have.
    """
    import matplotlib
    from matplotlib.figure import Figure

    floors = [row for row in found.methods if row.label == found.local]
    floors += [found.base] if found.base is not None else []
    rows = [row for row in found.methods if row.outcomes]
    tips: dict[str, list[str]] = {}
    with matplotlib.rc_context(inks.SETTINGS):
        drawn = Figure(figsize=(WIDTH, 0.9 + 0.36 * len(rows)), layout="constrained")
        panels = drawn.subplots(1, len(floors), sharey=True, squeeze=False)[0]
        for side, (panel, floor) in enumerate(zip(panels, floors, strict=True)):
            name = "the untouched backbone" if floor is found.base else "local training"
            for place, row in enumerate(rows):
                differences = by_client(row, floor)
                if row is floor or differences is None:
                    panel.text(0, place, "–", ha="center", va="center", color=inks.FAINT)
                    continue
                kinds = ((differences > 0, inks.BAD, "D"), (differences <= 0, inks.GOOD, "o"))
                for which, colour, marker in kinds:
                    at = np.flatnonzero(which)
                    gid = f"dots-{side}-{place}-{marker}"
                    _dots(panel, differences[at], place, colour, marker, gid)
                    tips[gid] = [
                        f"{printable(found.clients[i])}: {signed(differences[i])}"
                        for i in at[:_MOST_TIPS]
                    ]
                mean = differences.mean()
                panel.plot([mean, mean], [place - 0.3, place + 0.3], color=inks.INK, linewidth=1.4)
            panel.axvline(0, color=inks.RULE, linewidth=0.9, zorder=0)
            panel.set_title(f"against {name}", loc="left")
            panel.set_xlabel("loss minus its loss   (← helped · harmed →)")
            panel.grid(color=inks.RULE, linewidth=0.3)
            panel.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(rows)), [row.label for row in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        return inks.inline_svg(
            drawn,
            "clients",
            "Whom each method helps and harms, one dot a client",
            "; ".join(_told(row, found) for row in rows) + ".",
            tips,
        )


def _dots(panel: Axes, differences: Array, place: int, colour: str, marker: str, gid: str) -> None:
    """Put a row of dots, moved up and down a little so that equal ones can be told apart."""
    heights = place + 0.22 * np.sin(2.4 * np.arange(len(differences)))
    few = len(differences) <= 100
    size = (5.0 if few else 3.0) - (1.0 if marker == "D" else 0.0)
    panel.plot(
        *(differences, heights, marker),
        color=colour,
        markersize=size,
        markeredgewidth=0,
        alpha=0.85 if few else 0.5,
        gid=gid,
    )


def _told(row: Standing, found: Standings) -> str:
    n = len(found.clients)
    harmed = [sum(each) / len(each) for each in (row.harmed_by_local, row.harmed) if each]
    words = " and ".join(f"{each:g} of {n}" for each in harmed)
    return f"{row.label} harms {words} clients"

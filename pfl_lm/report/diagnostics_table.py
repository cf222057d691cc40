"""A run's diagnostics on a screen: the whole adapter round by round, one round layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pfl_lm.quantities import QUANTITIES, WHOLE, order
from pfl_lm.report.diagnostics import Told, means

MOST_ROUNDS, MOST_LAYERS = 20, 12
"""How many lines a table has; `diagnostics.csv` has the rest."""

HEADS = {
    "preconditioner_mean": "P",
    "gamma_mean": "γ",
    "gamma_std": "γ std",
    "offset_norm": "‖Δ‖",
    "gradient_variance": "var g",
    "update_variance": "var u",
    "step_variance": "var step",
    "cosine": "cos",
    "drift": "drift",
}

Means = Mapping[str, float]


def round_table(found: Sequence[Told]) -> Group:
    """Lay out the whole adapter's numbers, a line a round: means over the round's clients."""
    rounds = {round: each for (round, layer), each in means(found).items() if layer == WHOLE}
    clients: dict[int, set[str]] = {}
    for each in found:
        clients.setdefault(each.round, set()).add(each.client)
    shown, share = sorted(rounds), MOST_ROUNDS // 4
    if len(rounds) > MOST_ROUNDS:
        shown = shown[:share] + shown[share - MOST_ROUNDS :]
    quantities = _quantities(rounds.values())
    table = _table(["round", "clients"], quantities)
    for round in shown:
        cells = _cells(rounds[round], quantities)
        table.add_row(str(round), str(len(clients[round])), *cells)
    title = "the whole adapter, round by round: means over the clients"
    return Group(Text(title + _rest(len(rounds) - len(shown), "rounds")), table)


def layer_table(found: Sequence[Told], round: int) -> Group:
    """Lay out one round's numbers, a line a layer: means over the round's clients.

    Of many layers the first, the last and the worst are shown: those whose γ is highest, where the
    data oppose the offset most, or, for a method without γ, those that drift furthest.
    """
    here = {layer: each for (at, layer), each in means(found).items() if at == round}
    layers = sorted(here.keys() - {WHOLE}, key=order)
    quantities = _quantities(here.values())
    by = "gamma_mean" if "gamma_mean" in quantities else "drift"
    shown, worst = _some(layers, {layer: here[layer].get(by, float("-inf")) for layer in layers})
    table = _table(["layer"], quantities)
    for layer in shown:
        name = f"{layer} *" if layer in worst else layer
        table.add_row(name, *_cells(here[layer], quantities))
    title = f"round {round}, layer by layer: means over the clients"
    if worst:
        title += f" (* highest {HEADS[by]})"
    return Group(Text(title + _rest(len(layers) - len(shown), "layers")), table)


def _some(layers: Sequence[str], badness: Mapping[str, float]) -> tuple[list[str], set[str]]:
    """Return the layers to show, and which of them because they are the worst."""
    if len(layers) <= MOST_LAYERS:
        return list(layers), set()
    share = MOST_LAYERS // 3
    worst = set(sorted(layers, key=lambda layer: -badness[layer])[:share])
    there = {*layers[:share], *layers[-share:], *worst}
    return [layer for layer in layers if layer in there], worst


def _rest(n: int, what: str) -> str:
    return f"; {n} more {what} in diagnostics.csv" if n else ""


def _quantities(rows: Iterable[Means]) -> list[str]:
    there = {quantity for row in rows for quantity in row}
    return [quantity for quantity in QUANTITIES if quantity in there]


def _table(first: Sequence[str], quantities: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in (*first, *(HEADS[quantity] for quantity in quantities)):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(row: Means, quantities: Sequence[str]) -> list[str]:
    return [f"{row[name]:.2g}" if name in row else "" for name in quantities]

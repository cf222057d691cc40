"""What ``clients``' rules come to in a run: each client's layout, rate and longest example.

All of it follows from the recipe and from each client's own rows, so that every rank, and every
attempt to go on, finds the same. Clients for whom nothing is otherwise are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from pfl_lm.layout import AdapterLayout
from pfl_lm.recipe import Recipe
from pfl_lm.recipe.own import Own


def own_layouts(
    whole: AdapterLayout, recipe: Recipe, own: Mapping[str, Own]
) -> dict[str, AdapterLayout]:
    """Return the layouts of clients whose adapters are smaller than the resident one.

    Clients of one rank and the same modules share a layout.
    """
    if not recipe.mixes_ranks:
        return {}
    made: dict[tuple[int, frozenset[str]], AdapterLayout] = {}
    found = {}
    for client, each in own.items():
        key = (each.adapter.r, frozenset(each.adapter.target_modules))
        if key not in made:
            made[key] = whole.narrowed(*key)
        found[client] = made[key]
    return {client: layout for client, layout in found.items() if layout != whole}


def own_rates(recipe: Recipe, own: Mapping[str, Own]) -> dict[str, float]:
    """Return the learning rates of clients who have one of their own."""
    common = recipe.training.learning_rate
    rates = {client: each.training.learning_rate for client, each in own.items()}
    return {client: rate for client, rate in rates.items() if rate != common}

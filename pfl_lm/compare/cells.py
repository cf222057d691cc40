"""The runs of a comparison: a cell is one contender with one seed and one learning rate.

    <the comparison's folder>/cells/<label>-s<seed>-r<rate>/      an ordinary run folder

With the first seed every rate is run; with every other seed the one that was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pfl_lm.compare.plan import CELLS, Plan
from pfl_lm.recipe import LoadedRecipe
from pfl_lm.recipe.contenders import Contender

if TYPE_CHECKING:
    from pfl_lm.evaluate.rates import Grid

Rate = float | str


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a comparison, whether it has been run or not."""

    contender: Contender
    seed: int
    rate: Rate
    folder: Path

    @property
    def name(self) -> str:
        """Its run's name, which is its folder's."""
        rate = self.rate if isinstance(self.rate, str) else plain_rate(self.rate)
        return f"{self.contender.label}-s{self.seed}-r{rate}"

    @property
    def loaded(self) -> LoadedRecipe:
        """Its recipe: the contender's, with its own name, seed, rate and place."""
        recipe = self.contender.loaded.recipe
        changes = {
            "name": self.name,
            "seed": self.seed,
            "training": recipe.training.model_copy(update={"learning_rate": self.rate}),
            "runtime": recipe.runtime.model_copy(update={"output_dir": str(self.folder / CELLS)}),
        }
        return replace(self.contender.loaded, recipe=recipe.model_copy(update=changes))


def plain_rate(rate: float) -> str:
    """Return a rate as short as it can be written without becoming another one: ``0.004``, ``20``.

    It may stand in the name of a folder.
    """
    return repr(rate).removesuffix(".0").replace("+", "")


def grid_cells(plan: Plan) -> Iterator[Cell]:
    """Yield the cells of the first seed: every rate of every contender."""
    for contender in plan.contenders:
        for rate in contender.rates:
            yield Cell(contender, plan.seeds[0], rate, plan.folder)


def following_cells(plan: Plan, grids: Sequence[Grid]) -> Iterator[Cell]:
    """Yield the cells of the other seeds: of each contender the rate that was chosen.

    None of one whose rates were not all tried yet, or that diverged at all of them.
    """
    chosen = {grid.label: grid.chosen for grid in grids if grid.settled}
    for seed in plan.seeds[1:]:
        for contender in plan.contenders:
            rate = chosen.get(contender.label)
            if rate is not None:
                yield Cell(contender, seed, rate, plan.folder)


def other_cells(plan: Plan) -> Iterator[Cell]:
    """Yield every cell of the other seeds that there might be, chosen or not."""
    for seed in plan.seeds[1:]:
        for contender in plan.contenders:
            for rate in contender.rates:
                yield Cell(contender, seed, rate, plan.folder)

"""Which classes there are: those that a recipe lists, or all that the train rows have. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING

from pfl_lm.data.content import Labelled
from pfl_lm.data.problems import Problems
from pfl_lm.data.records import Record
from pfl_lm.data.words import did_you_mean, quoted, short
from pfl_lm.errors import DataError
from pfl_lm.recipe.task import MOST_LABELS, Task

if TYPE_CHECKING:
    from pfl_lm.data.splits import ClientRows
    from pfl_lm.recipe import Recipe

LIST_THEM = "list every class in data.labels; what is not in the list is refused"


def task_of(recipe: Recipe, clients: Mapping[str, ClientRows]) -> Task:
    """Return a recipe's task, with the labels of the clients' train rows if it lists none.

    Raises:
        DataError: a row has a label that is not among them, or there are too few or too many.
    """
    if recipe.task != "sequence_classification":
        return recipe.task_for()
    listed = recipe.data.labels is not None
    task = recipe.task_for(() if listed else _collected(clients))
    if not listed and not 2 <= len(task.labels) <= MOST_LABELS:
        found = f"only {short(task.labels[0])}" if task.labels else "none"
        found = found if len(task.labels) < 2 else f"{len(task.labels)} different ones"
        raise DataError(
            f"data: a classifier tells 2 to {MOST_LABELS} labels apart, and the "
            f"train rows have {found}",
            hint=LIST_THEM,
        )
    _refuse_unknown(recipe, clients, task)
    return task


def labelled(recipe: Recipe, clients: Mapping[str, ClientRows]) -> Recipe:
    """Return a recipe that lists the labels which `task_of` has found, if it needs any.

    Raises:
        DataError: as `task_of`.
    """
    task = task_of(recipe, clients)
    if recipe.data.labels is not None or not task.labels:
        return recipe
    data = recipe.data.model_copy(update={"labels": list(task.labels)})
    return recipe.model_copy(update={"data": data})


def _collected(clients: Mapping[str, ClientRows]) -> list[str]:
    """Return every label of a train row: in the order of numbers if all are, else of letters."""
    found = set(_labels(chain.from_iterable(rows.train for rows in clients.values())))
    if all(label.isascii() and label.isdigit() for label in found):
        return sorted(found, key=lambda label: (int(label), label))
    return sorted(found)


def _labels(rows: Iterable[Record]) -> Iterable[str]:
    return (row.content.label for row in rows if isinstance(row.content, Labelled))


def _refuse_unknown(recipe: Recipe, clients: Mapping[str, ClientRows], task: Task) -> None:
    problems = Problems()
    known = {label: label for label in task.labels}
    among = "data.labels" if recipe.data.labels is not None else "those of the train rows"
    for client, rows in clients.items():
        for row in (*rows.train, *rows.validation, *rows.test):
            content = row.content
            if isinstance(content, Labelled) and content.label not in known:
                problems.add(
                    f"{row.place}: client {short(client)}, {row.split}: the label "
                    f"{short(content.label)} is not among {among}: {quoted(known)}"
                    f"{did_you_mean(content.label, known)}"
                )
    problems.raise_if_any("data", hint=LIST_THEM)

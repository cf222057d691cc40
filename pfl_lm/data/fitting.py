"""Whether rows are what the recipe's task learns from. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pfl_lm.data.content import PromptCompletion, Text
from pfl_lm.data.labels import task_of
from pfl_lm.errors import DataError

if TYPE_CHECKING:
    from pfl_lm.data.splits import ClientRows
    from pfl_lm.recipe import Recipe

PAIRS_HINT = "`task: seq2seq_lm` reads `prompt` and `completion`, or `instruction` and `output`"


def refuse_misfit_rows(recipe: Recipe, clients: Mapping[str, ClientRows]) -> None:
    """Check rows against the task and the metrics that a recipe asks for.

    Raises:
        DataError: they are of another format, or of labels that are not known.
    """
    task_of(recipe, clients)
    rows = next(iter(clients.values())).train
    path, format = recipe.data.path, rows[0].format
    if recipe.task == "seq2seq_lm" and not isinstance(rows[0].content, PromptCompletion):
        raise DataError(
            f"{path}: its rows are of the format {format}, which is not one text and the text that "
            "answers it",
            hint=PAIRS_HINT,
        )
    if recipe.evaluation.metrics and isinstance(rows[0].content, Text):
        raise DataError(
            f"{path}: evaluation.metrics: {recipe.evaluation.metrics[0]} compares an answer with "
            "the one in the row, and rows of the format text have none",
            hint="leave evaluation.metrics out",
        )

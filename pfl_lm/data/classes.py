"""A text with its class, in tokens.

    [CLS] Berlin is a city . [SEP]   →   class 3 of (history, music, sport, places)

A row counts as one token: its loss is that of its one label. What the tokenizer puts before and
behind a text stays when a long one is cut, as in Transformers' own truncation.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from pfl_lm.data.chat import check_fast
from pfl_lm.data.content import Labelled
from pfl_lm.data.examples import Example
from pfl_lm.data.labels import LIST_THEM
from pfl_lm.data.words import quoted, short
from pfl_lm.errors import DataError
from pfl_lm.recipe.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_labelled(tokenizer: PreTrainedTokenizerBase, content: Labelled, task: Task) -> Example:
    """Tokenize a text as the tokenizer does any, with the number of its class.

    Raises:
        ModelError: the tokenizer is not a fast one.
        DataError: the label is none of the task's.
    """
    check_fast(tokenizer)
    if content.label not in task.numbers:
        raise DataError(
            f"the label {short(content.label)} is not among those of this run: "
            f"{quoted(task.labels)}",
            hint=LIST_THEM,
        )
    encoded = tokenizer(content.text, add_special_tokens=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    return Example(
        tuple(ids),
        (),
        label=task.numbers[content.label],
        ending=n_special_at_end(encoded.sequence_ids()),
    )


def n_special_at_end(sources: list[int | None]) -> int:
    """Return how many tokens the tokenizer has put behind a text: they come from no text."""
    return sum(1 for _ in takewhile(lambda source: source is None, reversed(sources)))

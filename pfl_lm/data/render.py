"""A row's content in tokens, whatever its format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pfl_lm.data.chat import render_turns
from pfl_lm.data.classes import render_labelled
from pfl_lm.data.content import Content, Labelled, PromptCompletion, Text
from pfl_lm.data.examples import Example
from pfl_lm.data.fitting import PAIRS_HINT
from pfl_lm.data.pairs import render_pair
from pfl_lm.data.text import render_text
from pfl_lm.errors import DataError
from pfl_lm.recipe.task import CAUSAL_LM, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(tokenizer: PreTrainedTokenizerBase, content: Content, task: Task = CAUSAL_LM) -> Example:
    """Return what a row holds in tokens, the supervised ones marked.

    Raises:
        ModelError: the tokenizer lacks what the format needs, or is not a fast one.
        DataError: the chat template cannot write the row, or the row is none of this task's.
    """
    if isinstance(content, Labelled):
        return render_labelled(tokenizer, content, task)
    if task.name == "seq2seq_lm":
        if not isinstance(content, PromptCompletion):
            raise DataError("not one text and the text that answers it", hint=PAIRS_HINT)
        return render_pair(tokenizer, content)
    if isinstance(content, Text):
        return render_text(tokenizer, content.text)
    return render_turns(tokenizer, content.turns)

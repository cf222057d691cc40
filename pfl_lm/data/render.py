"""A row's content in tokens, whatever its format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pfl_lm.data.chat import render_turns
from pfl_lm.data.content import Content, Text
from pfl_lm.data.examples import Example
from pfl_lm.data.text import render_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(tokenizer: PreTrainedTokenizerBase, content: Content) -> Example:
    """Return what a row holds in tokens, the supervised ones marked.

    Raises:
        ModelError: the tokenizer lacks what the format needs, or is not a fast one.
        DataError: the chat template cannot write the row.
    """
    if isinstance(content, Text):
        return render_text(tokenizer, content.text)
    return render_turns(tokenizer, content.turns)

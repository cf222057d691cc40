"""A text and the text that answers it, for an encoder with a decoder.

    encoder  translate: good morning </s>        decoder  buenos días </s>
                                                          ----------------  supervised

No chat template: what is asked stands as it is in the row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pfl_lm.data.classes import n_special_at_end
from pfl_lm.data.content import PromptCompletion
from pfl_lm.data.examples import Example
from pfl_lm.data.text import check_text_tokenizer, ends_itself

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_pair(tokenizer: PreTrainedTokenizerBase, content: PromptCompletion) -> Example:
    """Tokenize both texts; the answer ends with an end-of-text token.

    Raises:
        ModelError: the tokenizer has no end-of-text token, or is not a fast one.
    """
    check_text_tokenizer(tokenizer)
    asked = tokenizer(content.prompt, add_special_tokens=True, verbose=False)
    answer = tokenizer(text_target=content.completion, add_special_tokens=True, verbose=False)
    target: list[int] = answer["input_ids"]
    if not ends_itself(tokenizer, target, answer.sequence_ids()):
        target = [*target, tokenizer.eos_token_id]
    ending = n_special_at_end(asked.sequence_ids())
    return Example(tuple(asked["input_ids"]), (), target=tuple(target), ending=ending)

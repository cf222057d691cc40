"""Plain text as the model sees it: no chat template, and all of it is learnt.

    <bos> | Fellow-Citizens of the Senate ... <eos> |
          | ------------- supervised ------------- |

The tokenizer does what it does to any text: a first token is there if it puts one there. An
end-of-text token follows unless the tokenizer writes it itself; which of the two is the case is
told by where the last token comes from, not by its id, for a text may end with that very token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pfl_lm.data.chat import check_fast
from pfl_lm.data.examples import Example
from pfl_lm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Example:
    """Tokenize one text, supervised but for position 0, which nothing predicts.

    Raises:
        ModelError: the tokenizer has no end-of-text token, or is not a fast one.
    """
    check_text_tokenizer(tokenizer)
    encoded = tokenizer(text, add_special_tokens=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    if not ends_itself(tokenizer, ids, encoded.sequence_ids()):
        ids = [*ids, tokenizer.eos_token_id]
    return Example(tuple(ids), ((1, len(ids)),) if len(ids) > 1 else ())


def check_text_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that texts can be ended with this tokenizer.

    Raises:
        ModelError: it has no end-of-text token, or is not a fast one.
    """
    check_fast(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-text token, so the model would never learn to stop.",
            hint="name one as `eos_token` in the tokenizer_config.json of the backbone's folder",
        )


def ends_itself(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], sources: list[int | None]
) -> bool:
    """Say whether the tokenizer wrote the end-of-text token: it then comes from no text."""
    return bool(ids) and ids[-1] == tokenizer.eos_token_id and sources[-1] is None

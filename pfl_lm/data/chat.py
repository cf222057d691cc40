r"""A row as the model sees it: rendered by the tokenizer's chat template, the answer marked.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n | Hello!<|im_end|> | \n
    ------------------------ prompt ---------------------- | - supervised - |

The two borders are found by character position in the rendered text, never by token id: the
padding token may be the end-of-turn token, and an answer may quote either.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from pfl_lm.data.examples import Example
from pfl_lm.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE_HINT = (
    "training needs a template that writes a conversation from front to back and leaves the answer "
    "as it is; put one that does into the backbone's folder (chat_template.jinja)"
)


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    completion: str,
    max_length: int | None = None,
) -> Example:
    """Render one question and its answer, supervised from the answer to its end-of-turn token.

    The token ids are those of ``tokenizer.apply_chat_template`` for the same conversation, cut to
    ``max_length`` tokens if given. A token that belongs partly to the prompt is not supervised, nor
    is position 0, which nothing predicts.

    Raises:
        ModelError: the tokenizer has no chat template, or is not a fast one.
        DataError: the template refuses this row, or does not keep the answer in one piece.
    """
    check_tokenizer(tokenizer)
    text, begin, end = _rendered(tokenizer, prompt, completion)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    starts = _starts(text, encoded["offset_mapping"])
    first = max(1, _index(starts, begin))
    last = max(first, _end_of_turn(tokenizer, text, end, ids, starts))
    example = Example(tuple(ids), ((first, last),) if first < last else ())
    return example if max_length is None else example.cut(max_length)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that conversations can be rendered with this tokenizer.

    Raises:
        ModelError: it has no chat template, or is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} is not a fast one, so it cannot say which "
            "characters a token covers.",
            hint="use a backbone whose folder has a tokenizer.json",
        )
    try:
        tokenizer.get_chat_template()
    except ValueError:
        raise ModelError(
            "the tokenizer has no chat template, so there is no way to write a conversation.",
            hint="use an instruction-tuned backbone, or add a chat_template.jinja to its folder",
        ) from None


def _rendered(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> tuple[str, int, int]:
    """Return the whole text, where the answer's part begins and where the answer itself ends."""
    question = [{"role": "user", "content": prompt}]
    answer = {"role": "assistant", "content": completion}
    try:
        head = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template([*question, answer], tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template refuses this row: {error}") from error
    if not text.startswith(head):
        raise DataError(
            "the chat template writes the prompt differently once the answer follows, so the "
            "answer's tokens cannot be told from the prompt's.",
            hint=_TEMPLATE_HINT,
        )
    tail = text[len(head) :]
    if tail.startswith(completion):
        return text, len(head), len(head) + len(completion)
    said = completion.strip()
    space = len(tail) - len(tail.lstrip())
    if not tail.startswith(said, space):
        raise DataError(
            f"the chat template does not write the answer where the prompt ends: {tail[:40]!r} is "
            f"there, {said[:40]!r} was expected.",
            hint=_TEMPLATE_HINT,
        )
    return text, len(head), len(head) + space + len(said)


def _starts(text: str, spans: list[tuple[int, int]]) -> list[int]:
    """Return each token's first character.

    Some byte-level tokenizers (Llama 3) leave white space out of the spans they report: what no
    span covers belongs to the token after it. Several tokens may share one multi-byte character.
    """
    starts: list[int] = []
    covered = 0
    for start, stop in spans:
        uncovered = text[covered:start]
        starts.append(covered if uncovered and not uncovered.strip() else start)
        covered = stop
    return starts


def _index(starts: list[int], position: int) -> int:
    """Return the first token that begins at the character or after it, or the number of tokens."""
    return next((i for i, start in enumerate(starts) if start >= position), len(starts))


def _end_of_turn(
    tokenizer: PreTrainedTokenizerBase, text: str, end: int, ids: list[int], starts: list[int]
) -> int:
    """Return the position after the token that ends the turn.

    That is the first special token after the answer; where the template writes none, the last token
    before the trailing white space.
    """
    special = _special_ids(tokenizer, len(tokenizer))
    after = _index(starts, end)
    for i in range(after, len(ids)):
        if ids[i] in special:
            return i + 1
    return _index(starts, max(end, len(text.rstrip())))


@lru_cache(maxsize=4)
def _special_ids(tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> frozenset[int]:
    """Return the ids that stand for no plain text; cached until the vocabulary grows."""
    added = tokenizer.added_tokens_decoder
    return frozenset(i for i, t in added.items() if t.special or not t.content.isspace())

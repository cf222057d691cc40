r"""A conversation as the model sees it: rendered by the chat template, the answers marked.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n | Hello!<|im_end|> | \n
    ------------------------ prompt ---------------------- | - supervised - |

Where each answer stands is found by rendering what comes before it and what ends with it: both must
be the beginning of the whole. All borders are character positions in the rendered text, never token
ids: the padding token may be the end-of-turn token, and an answer may quote either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from pfl_lm.data.content import Turn
from pfl_lm.data.examples import Example
from pfl_lm.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE_HINT = (
    "training needs a template that writes a conversation from front to back and leaves the answer "
    "as it is; put one that does into the backbone's folder (chat_template.jinja)"
)


@dataclass(frozen=True, slots=True)
class _Answer:
    """Characters of the rendered text: where an answer's part begins, it and its turn end."""

    begin: int
    end: int
    turn_end: int


def render_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> Example:
    """Render a conversation, each of the assistant's turns supervised with its end-of-turn token.

    The token ids are those of ``tokenizer.apply_chat_template`` for the same conversation. A token
    that belongs partly to what comes before an answer is not supervised, nor is position 0, which
    nothing predicts.

    Raises:
        ModelError: the tokenizer has no chat template, or is not a fast one.
        DataError: the template refuses this row, writes a turn differently once others follow, or
            does not keep an answer in one piece.
    """
    check_tokenizer(tokenizer)
    text, answers = _rendered(tokenizer, turns)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    starts = _starts(text, encoded["offset_mapping"])
    spans: list[tuple[int, int]] = []
    for answer in answers:
        first = max(1, _index(starts, answer.begin))
        last = _end_of_turn(tokenizer, text, answer, ids, starts)
        if first < last:
            spans.append((first, last))
    return Example(tuple(ids), tuple(spans))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that conversations can be rendered with this tokenizer.

    Raises:
        ModelError: it has no chat template, or is not a fast one.
    """
    check_fast(tokenizer)
    try:
        tokenizer.get_chat_template()
    except ValueError:
        raise ModelError(
            "the tokenizer has no chat template, so there is no way to write a conversation.",
            hint="use an instruction-tuned backbone, or add a chat_template.jinja to its folder",
        ) from None


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that the tokenizer can say where its tokens come from.

    Raises:
        ModelError: it is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} is not a fast one, so it cannot say which "
            "characters a token covers.",
            hint="use a backbone whose folder has a tokenizer.json",
        )


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]
) -> tuple[str, list[_Answer]]:
    """Return the whole text, and where in it the assistant's answers stand."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    spoken = [k for k, turn in enumerate(turns) if turn.role == "assistant"]
    heads = [_write(tokenizer, messages[:k], to_be_continued=True) for k in spoken]
    text = _write(tokenizer, messages)
    answers: list[_Answer] = []
    for k, head in zip(spoken, heads, strict=True):
        through = _write(tokenizer, messages[: k + 1]) if k + 1 < len(turns) else text
        if not text.startswith(through) or (answers and len(head) < answers[-1].turn_end):
            raise DataError(
                f"{_template_of(tokenizer)} writes the first {k + 1} messages differently once "
                "more follow, so the answers' tokens cannot be told from the rest.",
                hint=_TEMPLATE_HINT,
            )
        if not through.startswith(head):
            raise DataError(
                f"{_template_of(tokenizer)} writes the prompt differently once the answer follows, "
                "so the answer's tokens cannot be told from the prompt's.",
                hint=_TEMPLATE_HINT,
            )
        end = len(head) + _answer_length(tokenizer, through[len(head) :], turns[k].content)
        answers.append(_Answer(len(head), end, len(through)))
    return text, answers


def _write(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    to_be_continued: bool = False,
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=to_be_continued
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{_template_of(tokenizer)} refuses this row: {error}") from error
    return text


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    name = tokenizer.name_or_path
    return f"the chat template of {name!r}" if name else "the chat template"


def _answer_length(tokenizer: PreTrainedTokenizerBase, tail: str, answer: str) -> int:
    """Return how many characters of ``tail`` are the answer, with or without white space."""
    if tail.startswith(answer):
        return len(answer)
    said = answer.strip()
    space = len(tail) - len(tail.lstrip())
    if not tail.startswith(said, space):
        raise DataError(
            f"{_template_of(tokenizer)} does not write the answer where the prompt ends: "
            f"{tail[:40]!r} is there, {said[:40]!r} was expected.",
            hint=_TEMPLATE_HINT,
        )
    return space + len(said)


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
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    answer: _Answer,
    ids: list[int],
    starts: list[int],
) -> int:
    """Return the position after the token that ends the turn.

    That is the first special token between the answer and the end of its turn; where the template
    writes none, the last token before the white space that ends the turn.
    """
    special = _special_ids(tokenizer, len(tokenizer))
    for i in range(_index(starts, answer.end), _index(starts, answer.turn_end)):
        if ids[i] in special:
            return i + 1
    return _index(starts, max(answer.end, len(text[: answer.turn_end].rstrip())))


@lru_cache(maxsize=4)
def _special_ids(tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> frozenset[int]:
    """Return the ids that stand for no plain text; cached until the vocabulary grows."""
    added = tokenizer.added_tokens_decoder
    return frozenset(i for i, t in added.items() if t.special or not t.content.isspace())

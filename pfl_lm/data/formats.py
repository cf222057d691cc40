"""The formats of a row, each told by its columns, and how its content is read.

    prompt_completion   prompt, completion (or response)
    messages            messages: [{"role": "system" | "user" | "assistant", "content": ...}, ...]
    alpaca              instruction, output, perhaps input
    sharegpt            conversations: [{"from": "system" | "human" | "gpt", "value": ...}, ...]
    text                text
    text_label          text, label

A file is of one format. Where the columns of two are there, ``data.format`` must say which is
meant: nothing is guessed. ``text_label`` is never told by its columns, for a text may well have a
label that is not to be learnt: it is the format of ``task: sequence_classification``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import get_args

from pfl_lm.data.cells import Cells
from pfl_lm.data.content import Content, Conversation, Format, Labelled, PromptCompletion, Text
from pfl_lm.data.turns import CONVERSATIONS, MESSAGES, read_turns
from pfl_lm.recipe.task import label_fault

FORMATS: tuple[Format, ...] = get_args(Format)
COLUMNS_SAID: Mapping[Format, str] = {
    "prompt_completion": "`prompt` and `completion` (or `response`)",
    "messages": "`messages`",
    "alpaca": "`instruction` and `output` (and perhaps `input`)",
    "sharegpt": "`conversations`",
    "text": "`text`",
    "text_label": "`text` and `label`",
}
_TOLD: tuple[Format, ...] = ("prompt_completion", "messages", "alpaca", "sharegpt", "text")
ANY_SAID = f"{', '.join(COLUMNS_SAID[format] for format in _TOLD[:-1])}, or `text`"

_COLUMNS: Mapping[Format, tuple[tuple[str, ...], ...]] = {
    "prompt_completion": (("prompt",), ("completion", "response")),
    "messages": (("messages",),),
    "alpaca": (("instruction",), ("output",)),
    "sharegpt": (("conversations",),),
    "text": (("text",),),
    "text_label": (("text",), ("label",)),
}
_HALVES: Collection[Format] = ("prompt_completion", "alpaca")
"""The formats of a question and an answer in columns of their own."""


def formats_of(columns: Collection[str]) -> list[Format]:
    """Return the formats whose columns are all there.

    If there are none, half of a question and its answer is taken for the whole, so that what is
    missing can be named.
    """
    found = [
        format
        for format in _TOLD
        if all(any(name in columns for name in names) for names in _COLUMNS[format])
    ]
    half = [
        format
        for format in _HALVES
        if any(name in columns for names in _COLUMNS[format] for name in names)
    ]
    return found or half[:1]


def first_column(format: Format, columns: Collection[str]) -> str:
    """Return the column of a format that comes first in ``columns``."""
    mine = {name for names in _COLUMNS[format] for name in names}
    return next(column for column in columns if column in mine)


def read_content(format: Format, cells: Cells) -> Content:
    """Return what a row holds; of use only if no fault was noted."""
    match format:
        case "messages":
            return Conversation(read_turns(cells, MESSAGES))
        case "sharegpt":
            return Conversation(read_turns(cells, CONVERSATIONS))
        case "alpaca":
            return _instruction(cells)
        case "text":
            return Text(cells.text("text"))
        case "text_label":
            return Labelled(cells.text("text"), _label(cells))
        case "prompt_completion":
            return _prompt_completion(cells)


def _label(cells: Cells) -> str:
    n_faults = len(cells.faults)
    label = cells.identifier("label", "label", "the column 'label'")
    if len(cells.faults) == n_faults and (fault := label_fault(label)):
        cells.faults.append(f"'label' {fault}")
    return label


def _prompt_completion(cells: Cells) -> PromptCompletion:
    prompt = cells.text("prompt")
    if "response" not in cells.columns:
        called = "the column 'completion' (or 'response')"
        return PromptCompletion(prompt, cells.text("completion", called))
    if "completion" in cells.columns:
        cells.faults.append("has both 'completion' and 'response', which mean the same. Keep one")
    return PromptCompletion(prompt, cells.text("response"))


def _instruction(cells: Cells) -> PromptCompletion:
    """Return an instruction, and below it what it is about, if that is given."""
    instruction = cells.text("instruction")
    given = cells.columns.get("input")
    if given is not None and (not isinstance(given, str) or given.strip()):
        instruction = f"{instruction}\n\n{cells.text('input')}"
    return PromptCompletion(instruction, cells.text("output"))

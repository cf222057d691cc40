"""The formats of a row, each told by its columns, and how its content is read.

    prompt_completion   prompt, completion (or response)
    messages            messages: [{"role": "system" | "user" | "assistant", "content": ...}, ...]
    text                text

A file is of one format. Where the columns of two are there, ``data.format`` must say which is
meant: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import get_args

from pfl_lm.data.cells import Cells, text_fault
from pfl_lm.data.content import Content, Conversation, Format, PromptCompletion, Role, Text, Turn
from pfl_lm.data.words import did_you_mean, kind_of, quoted, short

FORMATS: tuple[Format, ...] = get_args(Format)
ROLES: tuple[Role, ...] = get_args(Role)
COLUMNS_SAID: Mapping[Format, str] = {
    "prompt_completion": "`prompt` and `completion` (or `response`)",
    "messages": "`messages`",
    "text": "`text`",
}
ANY_SAID = f"{COLUMNS_SAID['prompt_completion']}, `messages`, or `text`"

MAX_MESSAGES = 1000
"""The longest conversation: to find its answers, it is rendered up to each of them."""

_COLUMNS: Mapping[Format, tuple[tuple[str, ...], ...]] = {
    "prompt_completion": (("prompt",), ("completion", "response")),
    "messages": (("messages",),),
    "text": (("text",),),
}
_KEYS = ("role", "content")
_ROLE_NAMES: Mapping[str, Role] = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter", "question"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai", "answer"), "assistant"),
    **dict.fromkeys(("developer", "instruction"), "system"),
}


def formats_of(columns: Collection[str]) -> list[Format]:
    """Return the formats whose columns are all there.

    If there are none, a half of a prompt and its completion is taken for the whole, so that what
    is missing can be named.
    """
    found = [
        format
        for format, needed in _COLUMNS.items()
        if all(any(name in columns for name in names) for names in needed)
    ]
    half = any(name in columns for names in _COLUMNS["prompt_completion"] for name in names)
    return found or (["prompt_completion"] if half else [])


def format_of(content: Content) -> Format:
    """Return the format that a row of this content was read in."""
    if isinstance(content, PromptCompletion):
        return "prompt_completion"
    return "messages" if isinstance(content, Conversation) else "text"


def first_column(format: Format, columns: Collection[str]) -> str:
    """Return the column of a format that comes first in ``columns``."""
    mine = {name for names in _COLUMNS[format] for name in names}
    return next(column for column in columns if column in mine)


def read_content(format: Format, cells: Cells) -> Content:
    """Return what a row holds; of use only if no fault was noted."""
    if format == "messages":
        return Conversation(_turns(cells))
    if format == "text":
        return Text(cells.text("text"))
    prompt = cells.text("prompt")
    if "response" not in cells.columns:
        called = "the column 'completion' (or 'response')"
        return PromptCompletion(prompt, cells.text("completion", called))
    if "completion" in cells.columns:
        cells.faults.append("has both 'completion' and 'response', which mean the same. Keep one")
    return PromptCompletion(prompt, cells.text("response"))


def _turns(cells: Cells) -> tuple[Turn, ...]:
    if cells.lacks("messages"):
        return ()
    messages = cells.columns["messages"]
    if not isinstance(messages, list):
        cells.faults.append(f"'messages' must be an array of messages, got {kind_of(messages)}")
        return ()
    if len(messages) > MAX_MESSAGES:
        cells.faults.append(
            f"'messages' holds {len(messages)} messages. At most {MAX_MESSAGES} are read"
        )
        return ()
    faults = [fault for n, said in enumerate(messages, 1) for fault in _message_faults(n, said)]
    cells.faults += faults or _order_faults(messages)
    if cells.faults:
        return ()
    return tuple(Turn(message["role"], message["content"]) for message in messages)


def _message_faults(n: int, message: object) -> list[str]:
    if not isinstance(message, dict):
        return [f"message {n} must be an object, got {kind_of(message)}"]
    faults = [f"message {n} lacks {key!r}" for key in _KEYS if key not in message]
    # Parquet writes a null for what one message has and another has not.
    others = [key for key, value in message.items() if key not in _KEYS and value is not None]
    if others:
        faults.append(f"message {n} has {quoted(others)}. Only 'role' and 'content' are read")
    if "role" in message and message["role"] not in ROLES:
        faults.append(f"'role' of message {n} {_role_fault(message['role'])}")
    if "content" in message and (fault := text_fault(message["content"])):
        faults.append(f"'content' of message {n} {fault}")
    return faults


def _role_fault(role: object) -> str:
    if not isinstance(role, str):
        return f"must be one of {quoted(ROLES)}, got {kind_of(role)}"
    meant = did_you_mean(role.strip().lower(), _ROLE_NAMES)
    return f"is {short(role)}, not one of {quoted(ROLES)}{meant}"


def _order_faults(messages: list[dict[str, str]]) -> list[str]:
    if not messages:
        return ["'messages' is empty. A conversation is a question and an answer at least"]
    faults = []
    if messages[0]["role"] == "assistant":
        faults.append("'messages' begins with an assistant turn, before anything is asked")
    if (last := messages[-1]["role"]) != "assistant":
        faults.append(f"'messages' ends with a {last} turn. The last one must be the assistant's")
    return faults

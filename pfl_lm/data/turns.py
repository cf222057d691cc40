"""A column that holds a conversation, message by message.

messages        {"role": "system" | "user" | "assistant", "content": ...}
conversations   {"from": "system" | "human" | "gpt", "value": ...}      as ShareGPT writes them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from pfl_lm.data.cells import Cells, text_fault
from pfl_lm.data.content import Role, Turn
from pfl_lm.data.words import did_you_mean, kind_of, quoted, short

ROLES: tuple[Role, ...] = get_args(Role)
MAX_MESSAGES = 1000
"""The longest conversation: to find its answers, it is rendered up to each of them."""

_MEANT: Mapping[str, Role] = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter", "question"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai", "answer"), "assistant"),
    **dict.fromkeys(("developer", "instruction"), "system"),
}


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a conversation is written: the column, the two keys of a message, its roles' names."""

    column: str
    role: str
    content: str
    names: Mapping[str, Role]

    def name_of(self, role: Role) -> str:
        """Return what a role is called here."""
        return next(name for name, meant in self.names.items() if meant == role)


_SHAREGPT: Mapping[str, Role] = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
    **{role: role for role in ROLES},
}
MESSAGES = Spelling("messages", "role", "content", {role: role for role in ROLES})
CONVERSATIONS = Spelling("conversations", "from", "value", _SHAREGPT)


def read_turns(cells: Cells, spelling: Spelling) -> tuple[Turn, ...]:
    """Return a row's conversation; what is wrong with it goes to ``cells.faults``."""
    column = spelling.column
    if cells.lacks(column):
        return ()
    messages = cells.columns[column]
    if not isinstance(messages, list):
        cells.faults.append(f"{column!r} must be an array of messages, got {kind_of(messages)}")
        return ()
    if len(messages) > MAX_MESSAGES:
        cells.faults.append(
            f"{column!r} holds {len(messages)} messages. At most {MAX_MESSAGES} are read"
        )
        return ()
    faults = [
        fault for n, said in enumerate(messages, 1) for fault in _message_faults(n, said, spelling)
    ]
    cells.faults += faults or _order_faults(messages, spelling)
    if cells.faults:
        return ()
    return tuple(
        Turn(spelling.names[message[spelling.role]], message[spelling.content])
        for message in messages
    )


def _message_faults(n: int, message: object, spelling: Spelling) -> list[str]:
    if not isinstance(message, dict):
        return [f"message {n} must be an object, got {kind_of(message)}"]
    keys = spelling.role, spelling.content
    faults = [f"message {n} lacks {key!r}" for key in keys if key not in message]
    # Parquet writes a null for what one message has and another has not.
    others = [key for key, value in message.items() if key not in keys and value is not None]
    if others:
        read = " and ".join(repr(key) for key in keys)
        faults.append(f"message {n} has {quoted(others)}. Only {read} are read")
    if spelling.role in message and (fault := _role_fault(message[spelling.role], spelling)):
        faults.append(f"{spelling.role!r} of message {n} {fault}")
    if spelling.content in message and (fault := text_fault(message[spelling.content])):
        faults.append(f"{spelling.content!r} of message {n} {fault}")
    return faults


def _role_fault(role: object, spelling: Spelling) -> str | None:
    if not isinstance(role, str):
        return f"must be one of {quoted(spelling.names)}, got {kind_of(role)}"
    if role in spelling.names:
        return None
    meant = {name: spelling.name_of(role) for name, role in _MEANT.items()}
    hint = did_you_mean(role.strip().lower(), meant)
    return f"is {short(role)}, not one of {quoted(spelling.names)}{hint}"


def _order_faults(messages: list[dict[str, str]], spelling: Spelling) -> list[str]:
    column = spelling.column
    if not messages:
        return [f"{column!r} is empty. A conversation is a question and an answer at least"]
    faults = []
    first, last = messages[0][spelling.role], messages[-1][spelling.role]
    if spelling.names[first] == "assistant":
        faults.append(f"{column!r} begins with an assistant turn, before anything is asked")
    if spelling.names[last] != "assistant":
        faults.append(f"{column!r} ends with a {last} turn. The last one must be the assistant's")
    return faults

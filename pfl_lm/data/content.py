"""What a row holds, by its format: question and answer, a conversation, text, or text and label.

No torch here. A format is told by the columns of the data, see ``formats``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Format = Literal["prompt_completion", "messages", "alpaca", "sharegpt", "text", "text_label"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """What is asked, and what is to be answered."""

    prompt: str
    completion: str

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The same as a conversation of two turns."""
        return Turn("user", self.prompt), Turn("assistant", self.completion)

    @property
    def parts(self) -> tuple[str, ...]:
        """All that tells this content from another of the same format."""
        return self.prompt, self.completion


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, the last of them the assistant's."""

    turns: tuple[Turn, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """All that tells this content from another of the same format."""
        return tuple(part for turn in self.turns for part in (turn.role, turn.content))


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is learnt as it stands, without a chat template."""

    text: str

    @property
    def parts(self) -> tuple[str, ...]:
        """All that tells this content from another of the same format."""
        return (self.text,)


@dataclass(frozen=True, slots=True)
class Labelled:
    """Text, and the name of the class it is of."""

    text: str
    label: str

    @property
    def parts(self) -> tuple[str, ...]:
        """All that tells this content from another of the same format."""
        return self.text, self.label


Content: TypeAlias = PromptCompletion | Conversation | Text | Labelled

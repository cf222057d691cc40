"""What a model trains on: token ids, and which of them count in the loss."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One row in tokens, of which those with ``first <= i < last`` of any span are supervised.

    Spans come in order, are not empty and do not overlap: an answer is one, a conversation has one
    for each of the assistant's turns.
    """

    input_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def n_supervised(self) -> int:
        """The number of tokens that count in the loss."""
        return sum(last - first for first, last in self.spans)

    def cut(self, max_length: int) -> Example:
        """Keep the first ``max_length`` tokens, which may leave none supervised."""
        n = min(max_length, len(self.input_ids))
        spans = tuple((first, min(last, n)) for first, last in self.spans if first < n)
        return Example(self.input_ids[:n], spans)

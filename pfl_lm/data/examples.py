"""What a model trains on: token ids, and what counts in the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Example:
    """One row in tokens, of which those with ``first <= i < last`` of any span are supervised.

    Spans come in order, are not empty and do not overlap: an answer is one, a conversation has one
    for each of the assistant's turns.

    Of other tasks there are no spans, and what counts is the number of the row's class, ``label``,
    as one token; or the tokens of what a decoder is to write, ``target``. ``ending`` tokens behind
    the text are the tokenizer's own.
    """

    input_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    label: int | None = None
    target: tuple[int, ...] = ()
    ending: int = 0

    @property
    def n_supervised(self) -> int:
        """The number of tokens that count in the loss."""
        if self.label is not None:
            return 1
        return len(self.target) or sum(last - first for first, last in self.spans)

    @property
    def n_longest(self) -> int:
        """The length of the row, in tokens; of its longer side, where a decoder has one too."""
        return max(len(self.input_ids), len(self.target))

    def cut(self, max_length: int) -> Example:
        """Keep the first ``max_length`` tokens, which may leave none supervised.

        Of other tasks' rows the last tokens stay that end a text.
        """
        if self.label is not None or self.target:
            return replace(
                self,
                input_ids=_cut(self.input_ids, max_length, self.ending),
                target=_cut(self.target, max_length, 1),
            )
        n = min(max_length, len(self.input_ids))
        spans = tuple((first, min(last, n)) for first, last in self.spans if first < n)
        return Example(self.input_ids[:n], spans)


def _cut(ids: tuple[int, ...], n: int, ending: int) -> tuple[int, ...]:
    """Return at most ``n`` tokens, the last ``ending`` of them those that were last."""
    return ids if len(ids) <= n else ids[: n - ending] + ids[len(ids) - ending :]

"""From rows to examples: none longer than it may be, and a count of what became of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from pfl_lm.data.examples import Example
from pfl_lm.data.problems import Problems
from pfl_lm.data.records import Record
from pfl_lm.data.render import render
from pfl_lm.data.words import short
from pfl_lm.errors import DataError
from pfl_lm.recipe.task import CAUSAL_LM, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnLong = Literal["truncate", "drop", "error"]


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the rows of one client and split.

    ``kept`` rows are there to learn from, and ``truncated`` of them lost their end to max_length.
    Of the others, ``long`` were left out because they are longer; the rest, ``dropped``, lost all
    supervised tokens.
    """

    rows: int
    kept: int
    truncated: int
    dropped: int
    long: int = 0

    def none_left(self, split: str, max_length: int) -> str:
        """Say why no row of ``split`` is left."""
        if self.long == self.rows:
            return (
                f"all {self.rows} {split} rows are longer than max_length {max_length}, and dropped"
            )
        return f"0 of {self.rows} {split} rows keep a supervised token at max_length {max_length}"


@dataclass(frozen=True, slots=True)
class RowTokenizer:
    """Makes examples of rows, of at most ``max_length`` tokens; longer ones go by ``on_long``.

    Equal token ids of all that it makes are one object, which takes about a quarter of the memory.
    ``said`` is what the recipe says for all, where this is for a client of its own length.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    on_long: OnLong = "truncate"
    task: Task = CAUSAL_LM
    said: int | None = None
    _known: dict[int, int] = field(default_factory=dict)
    _too_long: Problems = field(default_factory=Problems)

    def examples(
        self, rows: Sequence[Record], whole: Iterator[Example] | None = None
    ) -> tuple[tuple[Example, ...], Counts]:
        """Return the rows that are left to learn from, and what became of all.

        Where longer rows are an error, they are noted for `refuse_long`. ``whole`` yields the rows
        as `whole` makes them, if that was done.

        Raises:
            DataError: the template cannot write a row.
        """
        kept: list[Example] = []
        truncated = long = 0
        for row in rows:
            example = self.whole(row) if whole is None else next(whole)
            n_tokens = example.n_longest
            is_long = n_tokens > self.max_length
            if is_long and self.on_long == "drop":
                long += 1
                continue
            if is_long and self.on_long == "error":
                most = (
                    "" if self.said is None else f", the most of this client is {self.max_length}"
                )
                self._too_long.add(f"{_where(row)}: {n_tokens} tokens{most}")
            example = example.cut(self.max_length)
            if example.n_supervised:
                kept.append(example)
                truncated += is_long
        dropped = len(rows) - len(kept) - long
        return tuple(kept), Counts(len(rows), len(kept), truncated, dropped, long)

    def of_length(self, max_length: int | None) -> RowTokenizer:
        """Return what makes examples of another length, and remembers together with this."""
        if max_length is None:
            return self
        return replace(self, max_length=max_length, said=self.max_length)

    def refuse_long(self) -> None:
        """Name every row so far that is too long, if that is an error.

        Raises:
            DataError: there are some.
        """
        self._too_long.raise_if_any(
            f"data.on_long is error, data.max_length {self.said or self.max_length}, and some rows "
            "are longer",
            hint="raise data.max_length, or set data.on_long: truncate, or drop",
        )

    def whole(self, row: Record) -> Example:
        """Return a row as it is, however long.

        Raises:
            DataError: the template cannot write it.
        """
        try:
            made = render(self.tokenizer, row.content, self.task)
        except DataError as error:
            raise DataError(f"{_where(row)}: {error.message}", hint=error.hint) from error
        ids = tuple(self._known.setdefault(token, token) for token in made.input_ids)
        return replace(made, input_ids=ids)


def _where(row: Record) -> str:
    return f"{row.place} (client {short(row.client)})"

"""From examples to batches: padding, labels, and the order in which a client's rows are seen.

The loss is a sum over tokens, so each micro-batch of training carries the number of supervised
tokens in its accumulation window: the micro-batches that together make one optimizer step. Which
rows of a window share a micro-batch is nobody's business but the padding's: those of like length.

Where several ranks train one client together, each takes its share of every window's rows, and its
micro-batches still carry the supervised tokens of the whole window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pfl_lm.data.examples import Example

IGNORED = -100
"""The label of a token that does not count in the loss, as Hugging Face and PyTorch have it."""

OF_ROWS = ("input_ids", "attention_mask", "labels", "classes", "targets")
"""What of a batch has one row for each of its own, where it is there."""

_MEGA = 8
"""Micro-batches among whose rows those of like length are put together."""


class Rows:
    """A batch's rows as they were, without padding; they stay where they are when it is moved.

    Whoever needs to know which rows a batch has would otherwise ask the device, and wait for it.
    """

    __slots__ = ("ids",)

    def __init__(self, ids: Iterable[tuple[int, ...]]) -> None:
        self.ids = tuple(ids)

    def to(self, *where: object, **how: object) -> Rows:
        """Stay: what moves a batch asks everything in it that can be moved."""
        return self


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Any]:
    """Pad examples on the right to the longest of them.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape ``(batch, seq)``. Labels
        are not shifted: ``labels[:, i]`` is ``input_ids[:, i]`` where supervised, else -100.
        ``positions``, int64 ``(n,)``, are those of `predicting`. ``rows`` are `Rows`.

        Of rows with a class, ``classes``, int64 ``(batch,)``, in the place of the last three; of
        rows for a decoder, ``targets``, int64 ``(batch, longest target)``: what it is to write at
        each position, -100 behind its end.
    """
    shape = len(examples), max(len(example.input_ids) for example in examples)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        for first, last in example.spans:
            labels[row, first:last] = ids[first:last]
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    if examples[0].label is not None:
        return {**given, "classes": torch.tensor([example.label for example in examples])}
    if examples[0].target:
        return {**given, "targets": _targets(examples)}
    return {
        **given,
        "labels": labels,
        "positions": predicting(labels),
        "rows": Rows(example.input_ids for example in examples),
    }


def _targets(examples: Sequence[Example]) -> Tensor:
    longest = max(len(example.target) for example in examples)
    targets = torch.full((len(examples), longest), IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        targets[row, : len(example.target)] = torch.tensor(example.target, dtype=torch.int64)
    return targets


def predicting(labels: Tensor) -> Tensor:
    """Return the positions that predict a supervised token, into the batch flattened, ``(n,)``."""
    before = F.pad(labels[:, 1:] != IGNORED, (0, 1))
    return before.flatten().nonzero()[:, 0]


def training_batches(
    examples: Sequence[Example],
    *,
    steps: int,
    accumulation: int,
    batch_size: int,
    pad_token_id: int,
    seed: int,
    group_by_length: bool = False,
    rank: int = 0,
    n_ranks: int = 1,
) -> DataLoader[dict[str, Any]]:
    """Make the ``steps * accumulation`` micro-batches of one client turn.

    They walk through the rows in shuffled passes without replacement. No row is left out, and a
    pass has one smaller micro-batch if its rows are no multiple of ``batch_size``: the last, but
    for ``group_by_length``. The rows of an optimizer step are dealt out to its micro-batches from
    the longest to the shortest. The order depends on ``seed`` alone, and PyTorch's global generator
    is left as it was.

    With ``group_by_length`` rows of like length come together across steps too: every `_MEGA`
    micro-batches of a pass are made anew of their rows in order of length. A pass then takes its
    micro-batches in shuffled order, since a turn may be over before the pass is.

    With several ranks the rows of each window are dealt out to them by length, and a window of
    this rank is `accumulation_of_rank` micro-batches, some of them perhaps without any row.

    Returns:
        A loader of what ``collate`` makes, plus ``window_tokens``: an int, the supervised tokens of
        the whole optimizer step, on all ranks. It is alone where there is no row. Each iteration
        repeats it.

    Raises:
        ValueError: there are no examples, or steps, accumulation or batch_size is below 1.
    """
    if not examples:
        raise ValueError("a client turn needs at least one example")
    if min(steps, accumulation, batch_size) < 1:
        raise ValueError(
            f"steps, accumulation and batch_size must be at least 1, "
            f"got {steps}, {accumulation} and {batch_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(example.input_ids) for example in examples]
    mega = _MEGA if group_by_length else 1
    rows = _shuffled_passes(lengths, steps * accumulation, batch_size, generator, mega)
    rows = _by_length_in_windows(rows, lengths, accumulation)
    windows = [rows[start : start + accumulation] for start in range(0, len(rows), accumulation)]
    tokens = [sum(examples[i].n_supervised for i in chain.from_iterable(w)) for w in windows]
    if n_ranks > 1:
        accumulation = accumulation_of_rank(accumulation, n_ranks)
        windows = [_share(window, lengths, accumulation, rank, n_ranks) for window in windows]
    batches = _MicroBatches(examples, windows, tokens, pad_token_id)
    # Iterating a DataLoader draws a number, which without a generator comes from the global one.
    return DataLoader(batches, batch_size=None, shuffle=False, num_workers=0, generator=generator)


def accumulation_of_rank(accumulation: int, n_ranks: int) -> int:
    """Return how many micro-batches a rank's share of an optimizer step is, one at least."""
    return -(-accumulation // n_ranks)


def evaluation_batches(
    examples: Sequence[Example], batch_size: int, pad_token_id: int
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield every example once, longest first, as (positions in ``examples``, batch).

    Rows of like length share a batch, which saves padding; the positions bring the scores back in
    order.
    """
    order = longest_first(range(len(examples)), [len(example.input_ids) for example in examples])
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen, collate([examples[i] for i in chosen], pad_token_id)


def longest_first(rows: Iterable[int], lengths: Sequence[int]) -> list[int]:
    """Return rows in order of length; equally long ones stay in theirs."""
    return sorted(rows, key=lambda i: -lengths[i])


def _shuffled_passes(
    lengths: Sequence[int], n_batches: int, batch_size: int, generator: torch.Generator, mega: int
) -> list[list[int]]:
    n_rows = len(lengths)
    batches: list[list[int]] = []
    while len(batches) < n_batches:
        order = torch.randperm(n_rows, generator=generator).tolist()
        if mega > 1:
            starts = range(0, n_rows, mega * batch_size)
            parts = [order[start : start + mega * batch_size] for start in starts]
            order = [row for part in parts for row in longest_first(part, lengths)]
        cut = [order[start : start + batch_size] for start in range(0, n_rows, batch_size)]
        if mega > 1:
            cut = [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
        batches += cut
    return batches[:n_batches]


def _by_length_in_windows(
    batches: list[list[int]], lengths: Sequence[int], accumulation: int
) -> list[list[int]]:
    """Return micro-batches of the same sizes, those of each window with its rows by length."""
    if accumulation == 1:
        return batches
    dealt: list[list[int]] = []
    for start in range(0, len(batches), accumulation):
        window = batches[start : start + accumulation]
        rows = iter(longest_first(chain.from_iterable(window), lengths))
        dealt += [list(islice(rows, len(batch))) for batch in window]
    return dealt


def _share(
    window: list[list[int]], lengths: Sequence[int], n_batches: int, rank: int, n_ranks: int
) -> list[list[int]]:
    """Return a rank's rows of one window in so many micro-batches, none larger than the window's.

    Every ``n_ranks``-th row by length is its own, so that all ranks pad and compute alike.
    """
    rows = longest_first(chain.from_iterable(window), lengths)[rank::n_ranks]
    size = max(1, -(-len(rows) // n_batches))
    return [rows[i * size : (i + 1) * size] for i in range(n_batches)]


class _MicroBatches(Dataset[dict[str, Any]]):
    """Micro-batches by position, padded only when they are asked for."""

    def __init__(
        self,
        examples: Sequence[Example],
        windows: list[list[list[int]]],
        window_tokens: list[int],
        pad_token_id: int,
    ) -> None:
        self._examples = examples
        self._batches = [
            (rows, tokens)
            for window, tokens in zip(windows, window_tokens, strict=True)
            for rows in window
        ]
        self._pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows, window_tokens = self._batches[index]
        if not rows:
            return {"window_tokens": window_tokens}
        chosen = [self._examples[i] for i in rows]
        return {**collate(chosen, self._pad_token_id), "window_tokens": window_tokens}

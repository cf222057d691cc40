"""From examples to batches: padding, labels, and the order in which a client's rows are seen.

The loss is a sum over tokens, so each micro-batch of training carries the number of supervised
tokens in its accumulation window: the micro-batches that together make one optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pfl_lm.data.examples import Example

IGNORED = -100
"""The label of a token that does not count in the loss, as Hugging Face and PyTorch have it."""


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Pad examples on the right to the longest of them.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape ``(batch, seq)``. Labels
        are not shifted: ``labels[:, i]`` is ``input_ids[:, i]`` where supervised, else -100.
        ``positions``, int64 ``(n,)``, are those of `predicting`.
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
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "positions": predicting(labels),
    }


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
) -> DataLoader[dict[str, Tensor | int]]:
    """Make the ``steps * accumulation`` micro-batches of one client turn.

    They walk through the rows in shuffled passes without replacement. No row is left out: the last
    micro-batch of a pass may be smaller, and no micro-batch reaches over two passes. The order
    depends on ``seed`` alone, and PyTorch's global generator is left as it was.

    Returns:
        A loader of what ``collate`` makes, plus ``window_tokens``: an int, the supervised tokens of
        the ``accumulation`` micro-batches that share the optimizer step. Each iteration repeats it.

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
    rows = _shuffled_passes(len(examples), steps * accumulation, batch_size, generator)
    batches = _MicroBatches(examples, rows, accumulation, pad_token_id)
    # Iterating a DataLoader draws a number, which without a generator comes from the global one.
    return DataLoader(batches, batch_size=None, shuffle=False, num_workers=0, generator=generator)


def evaluation_batches(
    examples: Sequence[Example], batch_size: int, pad_token_id: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield every example once, longest first, as (positions in ``examples``, batch).

    Rows of like length share a batch, which saves padding; the positions bring the scores back in
    order.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen, collate([examples[i] for i in chosen], pad_token_id)


def _shuffled_passes(
    n_rows: int, n_batches: int, batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    batches: list[list[int]] = []
    while len(batches) < n_batches:
        order = torch.randperm(n_rows, generator=generator).tolist()
        batches += [order[start : start + batch_size] for start in range(0, n_rows, batch_size)]
    return batches[:n_batches]


class _MicroBatches(Dataset[dict[str, Tensor | int]]):
    """Micro-batches by position, padded only when they are asked for."""

    def __init__(
        self,
        examples: Sequence[Example],
        rows: list[list[int]],
        accumulation: int,
        pad_token_id: int,
    ) -> None:
        self._examples = examples
        self._rows = rows
        self._pad_token_id = pad_token_id
        tokens = [sum(examples[i].n_supervised for i in batch) for batch in rows]
        self._window_tokens = [
            sum(tokens[start : start + accumulation]) for start in range(0, len(rows), accumulation)
        ]
        self._accumulation = accumulation

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        chosen = [self._examples[i] for i in self._rows[index]]
        window_tokens = self._window_tokens[index // self._accumulation]
        return {**collate(chosen, self._pad_token_id), "window_tokens": window_tokens}

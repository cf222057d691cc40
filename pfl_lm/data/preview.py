"""What the model will be shown of each client: an example, lengths, and rows that stand twice.

Everything is counted on whole examples, as the tokenizer renders them, and only then cut; rows are
the same if their tokens are. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, groupby, pairwise
from statistics import median
from typing import TYPE_CHECKING

from pfl_lm.data.examples import Example
from pfl_lm.data.federated import FederatedDataset
from pfl_lm.data.splits import ClientRows
from pfl_lm.data.tokenizing import OnLong
from pfl_lm.recipe.task import CAUSAL_LM, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHOLE = 2**62
"""A length that no example has."""

Tokens = tuple[int, ...]
Kept = Callable[[Example], Example | None]
"""What an example becomes at its longest; None if it is left out."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an example, and whether its tokens are supervised."""

    text: str
    supervised: bool


@dataclass(frozen=True, slots=True)
class Spread:
    """The least, the middle and the most of a number over rows."""

    least: int
    middle: float
    most: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Spread:
        """Return the spread of at least one number."""
        return cls(min(numbers), median(numbers), max(numbers))


@dataclass(frozen=True, slots=True)
class SplitPreview:
    """The rows of one split.

    Attributes:
        cut: rows that are longer than ``max_length``, and keep a supervised token if they are cut.
        dropped: rows of which no supervised token is left, or that are left out for their length.
        twice: rows that stand in this split already.
    """

    rows: int
    cut: int
    dropped: int
    twice: int


@dataclass(frozen=True, slots=True)
class ClientPreview:
    """What there is to see of one client.

    Attributes:
        tokens: of whole rows, all splits.
        supervised: supervised tokens of whole rows, all splits.
        across: how many different rows stand in both of two splits.
        elsewhere: how many of its validation and test rows are another client's train rows.
        example: the first train row that is not dropped, as it will be trained on.
        example_cut_from: the tokens it had, if it is cut.
    """

    id: str
    splits: dict[str, SplitPreview]
    tokens: Spread
    supervised: Spread
    across: dict[tuple[str, str], int]
    elsewhere: int
    example: tuple[Piece, ...]
    example_cut_from: int | None


def preview_clients(
    rows_by_client: Mapping[str, ClientRows],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_long: OnLong = "truncate",
    shown: Collection[str] | None = None,
    own_lengths: Mapping[str, int] | None = None,
    task: Task = CAUSAL_LM,
) -> list[ClientPreview]:
    """Tokenize all rows and look at each client, or at those ``shown``, in the order of their ids.

    All rows are tokenized in any case: a row of one client may stand at another.

    Where longer rows would be an error, they are shown as cut. ``own_lengths`` are of clients for
    whom another length than ``max_length`` holds.

    Raises:
        ModelError: the tokenizer has no chat template, or is not a fast one.
        DataError: the template cannot write a row.
    """
    dataset = FederatedDataset.build(rows_by_client, tokenizer, _WHOLE, task=task)
    examples = {
        client.id: {
            "train": client.train,
            "validation": client.validation,
            "test": dataset.test(client.id),
        }
        for client in dataset
    }
    owners = Counter(
        row
        for splits in examples.values()
        for row in {example.input_ids for example in splits["train"]}
    )

    def kept(example: Example, longest: int) -> Example | None:
        left_out = on_long == "drop" and example.n_longest > longest
        return None if left_out else example.cut(longest)

    previews = []
    for client in examples if shown is None else sorted(shown):
        splits = examples[client]
        n_rows = {name: len(getattr(rows_by_client[client], name)) for name in splits}
        of_client = partial(kept, longest=(own_lengths or {}).get(client, max_length))
        previews.append(_client(client, splits, n_rows, owners, tokenizer, of_client, task))
    return previews


def _client(
    client: str,
    splits: Mapping[str, Sequence[Example]],
    n_rows: Mapping[str, int],
    owners: Counter[Tokens],
    tokenizer: PreTrainedTokenizerBase,
    kept: Kept,
    task: Task,
) -> ClientPreview:
    everything = [example for examples in splits.values() for example in examples]
    different = {name: {e.input_ids for e in examples} for name, examples in splits.items()}
    held_out = different["validation"] | different["test"]
    learnt = ((e, kept(e)) for e in splits["train"])
    whole, shown = next(((e, cut) for e, cut in learnt if cut and cut.n_supervised), (None, None))
    return ClientPreview(
        id=client,
        splits={name: _split(n_rows[name], splits[name], kept) for name in splits},
        tokens=Spread.of([len(example.input_ids) for example in everything]),
        supervised=Spread.of([example.n_supervised for example in everything]),
        across={
            (a, b): len(different[a] & different[b])
            for a, b in combinations(splits, 2)
            if different[a] & different[b]
        },
        elsewhere=sum(owners[row] > (row in different["train"]) for row in held_out),
        example=() if shown is None else tuple(pieces(shown, tokenizer, task)),
        example_cut_from=None if whole == shown or whole is None else len(whole.input_ids),
    )


def _split(n_rows: int, examples: Sequence[Example], kept: Kept) -> SplitPreview:
    learnt = [(whole, cut) for whole in examples if (cut := kept(whole)) and cut.n_supervised]
    return SplitPreview(
        rows=n_rows,
        cut=sum(whole != cut for whole, cut in learnt),
        dropped=n_rows - len(learnt),
        twice=len(examples) - len({example.input_ids for example in examples}),
    )


def pieces(
    example: Example, tokenizer: PreTrainedTokenizerBase, task: Task = CAUSAL_LM
) -> Iterator[Piece]:
    """Yield an example's text, in stretches that are supervised or are not.

    Behind it comes, on a line of its own, its class or what a decoder is to write.
    """
    if example.label is not None or example.target:
        text = tokenizer.decode(example.input_ids, clean_up_tokenization_spaces=False)
        yield Piece(f"{text}\n", supervised=False)
        if example.label is not None:
            yield Piece(task.labels[example.label], supervised=True)
        else:
            told = tokenizer.decode(example.target, clean_up_tokenization_spaces=False)
            yield Piece(told, supervised=True)
        return
    marked = zip(supervised(example), example.input_ids, strict=True)
    for mark, stretch in groupby(marked, key=lambda pair: pair[0]):
        ids = [token for _, token in stretch]
        yield Piece(tokenizer.decode(ids, clean_up_tokenization_spaces=False), mark)


def supervised(example: Example) -> list[bool]:
    """Return for each token whether it is supervised: whether leaving it off leaves one less."""
    counts = [example.cut(n).n_supervised for n in range(len(example.input_ids) + 1)]
    return [after > before for before, after in pairwise(counts)]

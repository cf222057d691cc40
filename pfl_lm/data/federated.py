"""Every client's examples in tokens, ready for training and for scoring.

Train and validation rows are tokenized when the data set is built, so that a client who could
learn nothing is named before anything trains. Test rows stay text until somebody asks: they are
read once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pfl_lm.data.chat import check_tokenizer
from pfl_lm.data.content import Text
from pfl_lm.data.examples import Example
from pfl_lm.data.problems import Problems
from pfl_lm.data.records import Record
from pfl_lm.data.render import render
from pfl_lm.data.splits import ClientRows
from pfl_lm.data.words import short
from pfl_lm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the rows of one client and split.

    ``kept`` rows have a supervised token, and ``truncated`` of them lost their end to max_length;
    ``dropped`` rows lost all supervised tokens.
    """

    rows: int
    kept: int
    truncated: int
    dropped: int


@dataclass(frozen=True, slots=True)
class ClientData:
    """One client's examples and what they were made from; test rows are still text."""

    id: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test_rows: tuple[Record, ...]
    counts: Mapping[Literal["train", "validation"], Counts]

    @property
    def n_train(self) -> int:
        """The number of train examples, each with a supervised token."""
        return len(self.train)


class FederatedDataset:
    """The clients' data by id. Made by ``build``; nothing in it changes afterwards.

    Attributes:
        plain_text: whether all of it is text that is learnt without a chat template.
    """

    def __init__(
        self,
        clients: Mapping[str, ClientData],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        plain_text: bool = False,
    ) -> None:
        self.plain_text = plain_text
        self._clients = clients
        self._tokenizer = tokenizer
        self._max_length = max_length

    @classmethod
    def build(
        cls,
        records_by_client: Mapping[str, ClientRows],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> FederatedDataset:
        """Tokenize every client's train and validation rows, cut to ``max_length`` tokens.

        Raises:
            ModelError: the tokenizer has no chat template (for texts: no end-of-text token), or is
                not a fast one.
            DataError: the template cannot write a row, or no train (or validation) row of a client
                keeps a supervised token; all such clients are named.
        """
        # Before any row; texts are written without a template.
        contents = [row.content for rows in records_by_client.values() for row in rows.train]
        plain_text = bool(contents) and all(isinstance(content, Text) for content in contents)
        if not plain_text:
            check_tokenizer(tokenizer)
        clients: dict[str, ClientData] = {}
        known: dict[int, int] = {}
        problems = Problems()
        for client_id, rows in sorted(records_by_client.items()):
            train, n_train = _tokenize(rows.train, tokenizer, max_length, known)
            validation, n_validation = _tokenize(rows.validation, tokenizer, max_length, known)
            counts: dict[Literal["train", "validation"], Counts]
            counts = {"train": n_train, "validation": n_validation}
            clients[client_id] = ClientData(client_id, train, validation, rows.test, counts)
            for split, count in counts.items():
                if not count.kept:
                    problems.add(
                        f"client {short(client_id)}: 0 of {count.rows} {split} rows keep a "
                        f"supervised token at max_length {max_length}"
                    )
        problems.raise_if_any(
            "data", hint="raise data.max_length, or shorten these clients' prompts"
        )
        return cls(clients, tokenizer, max_length, plain_text=plain_text)

    def __len__(self) -> int:
        return len(self._clients)

    def __iter__(self) -> Iterator[ClientData]:
        return iter(self._clients.values())

    def __getitem__(self, client_id: str) -> ClientData:
        return self._clients[client_id]

    @property
    def client_ids(self) -> tuple[str, ...]:
        """Every client's id, sorted."""
        return tuple(self._clients)

    def n_train(self, client_id: str) -> int:
        """Return the number of train examples, each with a supervised token."""
        return self[client_id].n_train

    def train(self, client_id: str) -> tuple[Example, ...]:
        """Return what the client trains on."""
        return self[client_id].train

    def validation(self, client_id: str) -> tuple[Example, ...]:
        """Return what the client chooses by."""
        return self[client_id].validation

    def test(self, client_id: str) -> tuple[Example, ...]:
        """Tokenize the client's test rows, of which there may be none.

        Raises:
            DataError: the chat template cannot write a row.
        """
        examples, _ = _tokenize(self[client_id].test_rows, self._tokenizer, self._max_length)
        return examples

    def counts(self, client_id: str, split: Literal["train", "validation", "test"]) -> Counts:
        """Return what became of a client's rows; for ``test`` this tokenizes them."""
        client = self[client_id]
        if split == "test":
            return _tokenize(client.test_rows, self._tokenizer, self._max_length)[1]
        return client.counts[split]


def _tokenize(
    rows: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    known: dict[int, int] | None = None,
) -> tuple[tuple[Example, ...], Counts]:
    """Return the rows that keep a supervised token, and what became of all.

    With ``known``, which is added to, equal token ids are one object: a quarter of the memory.
    """
    kept: list[Example] = []
    truncated = 0
    for row in rows:
        try:
            whole = render(tokenizer, row.content)
        except DataError as error:
            where = f"{row.place} (client {short(row.client)})"
            raise DataError(f"{where}: {error.message}", hint=error.hint) from error
        example = whole.cut(max_length)
        if known is not None:
            ids = tuple(known.setdefault(token, token) for token in example.input_ids)
            example = Example(ids, example.spans)
        if example.n_supervised:
            kept.append(example)
            truncated += len(whole.input_ids) > max_length
    return tuple(kept), Counts(len(rows), len(kept), truncated, len(rows) - len(kept))

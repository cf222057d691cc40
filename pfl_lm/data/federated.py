"""Every client's examples in tokens, ready for training and for scoring.

Train and validation rows are tokenized when the data set is built, so that a client who could
learn nothing is named before anything trains. Test rows stay text until somebody asks: they are
read once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pfl_lm.data.chat import check_tokenizer
from pfl_lm.data.content import Text
from pfl_lm.data.examples import Example
from pfl_lm.data.kept import keep
from pfl_lm.data.problems import Problems
from pfl_lm.data.records import Record
from pfl_lm.data.splits import ClientRows
from pfl_lm.data.tokenizing import Counts, OnLong, RowTokenizer
from pfl_lm.data.words import short
from pfl_lm.recipe.task import CAUSAL_LM, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        tokenize: RowTokenizer,
        own: Mapping[str, RowTokenizer] | None = None,
        *,
        plain_text: bool = False,
    ) -> None:
        self.plain_text = plain_text
        self._clients = clients
        self._tokenize = tokenize
        self._own = own or {}

    @property
    def task(self) -> Task:
        """What its rows are for, with the names of its classes if it has any."""
        return self._tokenize.task

    @classmethod
    def build(
        cls,
        records_by_client: Mapping[str, ClientRows],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        on_long: OnLong = "truncate",
        own_lengths: Mapping[str, int] | None = None,
        task: Task = CAUSAL_LM,
        *,
        kept: Path | None = None,
    ) -> FederatedDataset:
        """Tokenize every client's train and validation rows, none longer than ``max_length``.

        ``own_lengths`` are of clients for whom another length holds; ``kept`` is the folder in
        which tokens are kept between runs, if they are.

        Raises:
            ModelError: the tokenizer has no chat template (for texts: no end-of-text token), or is
                not a fast one.
            DataError: the template cannot write a row, rows are longer and ``on_long`` says error,
                or no train (or validation) row of a client is left; all of them are named.
        """
        # Before any row; texts are written without a template.
        contents = [row.content for rows in records_by_client.values() for row in rows.train]
        plain_text = bool(contents) and all(isinstance(content, Text) for content in contents)
        if not plain_text and task.name == "causal_lm":
            check_tokenizer(tokenizer)
        common = RowTokenizer(tokenizer, max_length, on_long, task)
        own = {client: common.of_length(n) for client, n in (own_lengths or {}).items()}
        whole = _whole(records_by_client, common, kept)
        clients: dict[str, ClientData] = {}
        problems = Problems()
        for client_id, rows in sorted(records_by_client.items()):
            tokenize = own.get(client_id, common)
            train, n_train = tokenize.examples(rows.train, whole)
            validation, n_validation = tokenize.examples(rows.validation, whole)
            if on_long == "error":
                tokenize.examples(rows.test)  # at the end it would be too late to say so
            counts: dict[Literal["train", "validation"], Counts]
            counts = {"train": n_train, "validation": n_validation}
            clients[client_id] = ClientData(client_id, train, validation, rows.test, counts)
            for split, count in counts.items():
                if not count.kept:
                    said = count.none_left(split, tokenize.max_length)
                    problems.add(f"client {short(client_id)}: {said}")
        common.refuse_long()
        problems.raise_if_any(
            "data", hint="raise data.max_length, or shorten these clients' prompts"
        )
        return cls(clients, common, own, plain_text=plain_text)

    def _tokenizer(self, client_id: str) -> RowTokenizer:
        return self._own.get(client_id, self._tokenize)

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
        return self._tokenizer(client_id).examples(self[client_id].test_rows)[0]

    def counts(self, client_id: str, split: Literal["train", "validation", "test"]) -> Counts:
        """Return what became of a client's rows; for ``test`` this tokenizes them."""
        client = self[client_id]
        if split == "test":
            return self._tokenizer(client_id).examples(client.test_rows)[1]
        return client.counts[split]


def _whole(
    clients: Mapping[str, ClientRows], tokenize: RowTokenizer, folder: Path | None
) -> Iterator[Example] | None:
    """Yield all train and validation rows in tokens, client by client; None if none are kept.

    What is kept has tokens and spans and nothing else: rows of other tasks have more.
    """
    if folder is None or tokenize.task.name != "causal_lm":
        return None
    rows = [row for _, own in sorted(clients.items()) for row in (*own.train, *own.validation)]
    contents = [row.content for row in rows]
    return iter(
        keep(folder, tokenize.tokenizer, contents, lambda: [tokenize.whole(row) for row in rows])
    )

"""The section `data`: where the clients' examples come from, and what they look like."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, PlainValidator, field_validator, model_validator

from pfl_lm.recipe.options import MOST, Options, broken
from pfl_lm.recipe.partition import PartitionOptions, names
from pfl_lm.recipe.scalars import show
from pfl_lm.recipe.sections import Text


def _count_or_ids(value: object) -> object:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST
    if is_count or names(value):
        return value
    raise broken(
        f"must be a number of clients, or a list of ids such as [alice, bob], got {show(value)}"
    )


_Count = Annotated[int, Field(ge=0, le=MOST)]
_CountOrIds = Annotated[
    int | list[str], PlainValidator(_count_or_ids, json_schema_input_type=_Count | list[Text])
]


class DataOptions(Options):
    """The clients' examples: one file with a column that names the client, or a file for each."""

    path: Text = Field(
        description="File of examples (.jsonl, .json, .csv or .parquet), or a folder with one such "
        "file for each client, named for it.",
        examples=["clients.jsonl"],
    )
    format: Literal["auto", "prompt_completion", "messages", "alpaca", "sharegpt", "text"] = Field(
        default="auto", description="What an example consists of; auto: told by the columns."
    )
    columns: dict[Text, Text] = Field(
        default={},
        description="Columns to be read under another name, `theirs: ours`, such as "
        "`{question: prompt, answer: completion}`.",
        examples=[{"question": "prompt"}],
    )
    client_column: Text = Field(
        default="client",
        description="Column that says whose example it is; a folder of files needs none.",
    )
    partition: PartitionOptions | None = Field(
        default=None,
        description="Makes clients out of rows that name none, in place of `client_column`.",
        examples=[{"name": "iid", "num_partitions": 10}],
    )
    split_column: Text | None = Field(
        default=None, description="Column that says train, validation or test, if there is one."
    )
    group_column: Text | None = Field(
        default=None,
        description="Column that says which of a client's examples belong together, such as those "
        "of one document; they are held out for validation together or not at all.",
    )
    validation_fraction: float = Field(
        default=0.125,
        gt=0,
        lt=1,
        description="Share of a client's training rows held out for validation.",
    )
    min_train_samples: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="Clients with fewer train rows, those held out for validation among them, are "
        "left out; not set: such a client is an error if it cannot take part.",
    )
    max_train_samples: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="Most train rows of a client; of more, those whose hash is smallest are kept.",
    )
    holdout_clients: _CountOrIds = Field(
        default=0,
        description="Clients kept for later, so many (chosen by a hash of their ids) or these: "
        "they take no part until `pfl-lm join`.",
    )
    max_length: int = Field(
        default=512, ge=8, le=1_000_000, description="Longest example, in tokens."
    )
    on_long: Literal["truncate", "drop", "error"] = Field(
        default="truncate",
        description="What becomes of a longer one: it loses its end, or is left out, or nothing "
        "runs; how many there are is said.",
    )
    group_by_length: bool = Field(
        default=False,
        description="true: rows of like length share a micro-batch, so that less is padded; what "
        "a step learns from is then less mixed.",
    )

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        if self.partition is not None and self.client_column != "client":
            raise broken("must be left out: `data.client_column` names the clients", "partition")
        if self.split_column == self.client_column:
            raise broken("must not be the same column as `data.client_column`", "split_column")
        if self.group_column == self.client_column:
            raise broken("must not be the same column as `data.client_column`", "group_column")
        if self.group_column is not None and self.group_column == self.split_column:
            raise broken("must not be the same column as `data.split_column`", "group_column")
        return self

    @property
    def length(self) -> tuple[int, Literal["truncate", "drop", "error"]]:
        """The most tokens of an example, and what becomes of a longer one."""
        return self.max_length, self.on_long

    @field_validator("columns")
    @classmethod
    def _one_name_each(cls, columns: dict[str, str]) -> dict[str, str]:
        twice = [name for name, n in Counter(columns.values()).items() if n > 1]
        if twice:
            theirs = [column for column, name in columns.items() if name == twice[0]]
            raise broken(f"{show(theirs[0])} and {show(theirs[1])} cannot both be {show(twice[0])}")
        return columns

"""The section `data`: where the clients' examples come from, and what they look like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PlainValidator, field_validator, model_validator

from pfl_lm.recipe.kinds import PackageName, Text, file_within, fits
from pfl_lm.recipe.options import MOST, Options, broken
from pfl_lm.recipe.partition import PartitionOptions, names
from pfl_lm.recipe.scalars import show
from pfl_lm.recipe.task import Labels


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


_SOURCES = ("path", "package", "dataset_name")
_GOES_WITH: Mapping[str, str] = {
    "data_file": "package",
    "dataset_config_name": "dataset_name",
    "revision": "dataset_name",
    "dataset_train_split": "dataset_name",
    "dataset_validation_split": "dataset_name",
    "dataset_test_split": "dataset_name",
}
DatasetId = Annotated[str, fits(r"\w[\w.-]*/\w[\w.-]*", "a dataset's Hub id such as ORG/NAME")]


class DataOptions(Options):
    """The clients' examples: files, a file of an installed package, or a dataset of the Hub."""

    path: Text | None = Field(
        default=None,
        description="File of examples (.jsonl, .json, .csv or .parquet), or a folder with one such "
        "file for each client, named for it. This, `package` or `dataset_name`.",
        examples=["clients.jsonl"],
    )
    package: PackageName | None = Field(
        default=None,
        description="Installed Python package that carries the examples; it is never imported.",
        examples=["my_rows"],
    )
    data_file: Annotated[str, AfterValidator(file_within)] | None = Field(
        default=None,
        description="File of examples inside the package.",
        examples=["data/clients.jsonl"],
    )
    dataset_name: DatasetId | None = Field(
        default=None,
        description="Dataset of the Hub, read by Hugging Face's `datasets`; of its files, those "
        "with rows: JSON, CSV, Parquet, Arrow or text.",
        examples=["databricks/databricks-dolly-15k"],
    )
    dataset_config_name: Text | None = Field(
        default=None, description="Which of the dataset's configurations; needed if it has several."
    )
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit of the dataset on the Hub."
    )
    dataset_train_split: Text | None = Field(
        default=None,
        description="The dataset's split whose rows are trained on, or a part of it such as "
        "`train[:10%]`; not set: `train`.",
        examples=["train"],
    )
    dataset_validation_split: Text | None = Field(
        default=None, description="The split of the validation rows, if there is one."
    )
    dataset_test_split: Text | None = Field(
        default=None, description="The split of the test rows, if there is one."
    )
    format: Literal[
        "auto", "prompt_completion", "messages", "alpaca", "sharegpt", "text", "text_label"
    ] = Field(
        default="auto",
        description="What an example consists of; auto: told by the columns, and `text_label` for "
        "`task: sequence_classification`.",
    )
    columns: dict[Text, Text] = Field(
        default={},
        description="Columns to be read under another name, `theirs: ours`, such as "
        "`{question: prompt, answer: completion}`.",
        examples=[{"question": "prompt"}],
    )
    labels: Labels | None = Field(
        default=None,
        description="The classes of `task: sequence_classification`; not set: all that the "
        "clients' train rows have, sorted.",
        examples=[["history", "music"]],
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
    def _one_source(self) -> Self:
        given = [key for key in _SOURCES if getattr(self, key) is not None]
        if not given:
            more = "or name a `package`, or a `dataset_name`"
            raise broken(f"missing. Add it, for example `path: clients.jsonl`; {more}", "path")
        if len(given) > 1:
            raise broken(f"needs only one source; {' and '.join(given)} are given")
        for key, source in _GOES_WITH.items():
            if getattr(self, key) is not None and source != given[0]:
                raise broken(f"goes with `{source}` only, not with `{given[0]}`", key)
        if self.package is not None and self.data_file is None:
            raise broken("missing: `data.package` needs to know its `data_file`", "data_file")
        return self

    @model_validator(mode="after")
    def _splits_differ(self) -> Self:
        if self.dataset_name is None:
            return self
        splits = self.dataset_splits
        for key, split in splits.items():
            if list(splits.values()).count(split) > 1 and key != "train":
                raise broken(
                    f"{show(split)} is another one's split already", f"dataset_{key}_split"
                )
        if self.split_column is not None and len(splits) > 1:
            raise broken(
                "must be left out: the dataset's splits say which rows are which", "split_column"
            )
        return self

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
    def dataset_splits(self) -> dict[Literal["train", "validation", "test"], str]:
        """The splits of the Hub's dataset that are read, by what their rows are for."""
        named: dict[Literal["train", "validation", "test"], str | None] = {
            "train": self.dataset_train_split or "train",
            "validation": self.dataset_validation_split,
            "test": self.dataset_test_split,
        }
        return {split: name for split, name in named.items() if name is not None}

    @property
    def source(self) -> str:
        """Where the examples are, in as few words as a message begins with."""
        if self.package is not None:
            return f"{self.package}/{self.data_file}"
        return self.path or self.dataset_name or ""

    def of_file(self, path: str) -> Self:
        """Return what reads a file that names its clients, in the same form as these examples."""
        others = dict.fromkeys((*_SOURCES, *_GOES_WITH, "partition"))
        return self.model_copy(update={**others, "path": path})

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

"""How clients are made out of rows that name none, for research. Names as in flwr-datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, PlainValidator, model_validator

from pfl_lm.recipe.options import MOST, Options, broken
from pfl_lm.recipe.scalars import show

PartitionName = Literal["natural_id", "iid", "dirichlet", "shards", "by_size"]
_NEEDS: Mapping[PartitionName, tuple[str, ...]] = {
    "natural_id": ("partition_by",),
    "iid": ("num_partitions",),
    "dirichlet": ("num_partitions", "partition_by", "alpha"),
    "shards": ("num_partitions", "partition_by", "num_shards_per_partition"),
    "by_size": ("partition_sizes",),
}
_TAKES: Mapping[PartitionName, tuple[str, ...]] = {"dirichlet": ("min_partition_size",)}
_EXAMPLES: Mapping[str, str] = {
    "partition_by": "topic",
    "num_partitions": "10",
    "alpha": "0.5",
    "num_shards_per_partition": "2",
    "partition_sizes": "[400, 200, 100]",
}


def names(value: object) -> bool:
    """Return whether a value is a list of texts, none of them empty."""
    return isinstance(value, list) and all(isinstance(each, str) and each for each in value)


def _column_or_columns(value: object) -> object:
    if value is None or (isinstance(value, str) and value) or (value and names(value)):
        return value
    raise broken(
        f"must be a column, or a list of them such as [language, topic], got {show(value)}"
    )


_Columns = Annotated[
    str | list[str] | None,
    PlainValidator(_column_or_columns, json_schema_input_type=str | list[str] | None),
]
Size = Annotated[int, Field(ge=1, le=MOST)]


class PartitionOptions(Options):
    """Clients made out of rows, in place of a column that names them; see [data](data.md)."""

    name: PartitionName = Field(
        description="natural_id: a client for each value of a column; iid: rows dealt at random; "
        "dirichlet: shares of each value drawn from a Dirichlet distribution; shards: few values "
        "each; by_size: at random, in given proportions.",
        examples=["dirichlet"],
    )
    num_partitions: int | None = Field(
        default=None, ge=1, le=MOST, description="Number of clients (iid, dirichlet, shards)."
    )
    partition_by: _Columns = Field(
        default=None,
        description="Column that rows are told apart by, or several whose values are joined by "
        "`:` (natural_id, dirichlet, shards).",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        le=MOST,
        description="Concentration of the Dirichlet distribution: the smaller, the less alike the "
        "clients (dirichlet).",
    )
    min_partition_size: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="Least train rows of a client; shares are drawn again until all have as many, "
        "ten times at most. Not set: 2 (dirichlet).",
    )
    num_shards_per_partition: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="How many pieces of the rows, sorted by value, a client gets (shards).",
    )
    partition_sizes: list[Size] | None = Field(
        default=None,
        min_length=1,
        description="The clients' sizes, in proportion to each other (by_size).",
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of the partition alone.")

    @model_validator(mode="after")
    def _only_its_own(self) -> Self:
        needs = _NEEDS[self.name]
        for key in needs:
            if getattr(self, key) is None:
                raise broken(f"`{self.name}` needs it, for example `{key}: {_EXAMPLES[key]}`", key)
        for key in type(self).model_fields.keys() - {"name", "seed", *needs}:
            if getattr(self, key) is not None and key not in _TAKES.get(self.name, ()):
                whose = [name for name in get_args(PartitionName) if key in _keys(name)]
                raise broken(f"is an option of {' and '.join(whose)}, not of {self.name}", key)
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that rows are told apart by; none if chance alone decides."""
        by = self.partition_by
        return () if by is None else (by,) if isinstance(by, str) else tuple(by)


def _keys(name: PartitionName) -> tuple[str, ...]:
    return (*_NEEDS[name], *_TAKES.get(name, ()))

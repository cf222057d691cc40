"""What is said of the backbone and of the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfl_lm.errors import RecipeError
from tests.recipe.minimal import HEAD, PFLALIGN, load

BACKBONES = [
    ("{}", "backbone: needs exactly one of `model_name_or_path` and `package`; neither is given"),
    ("{model_name_or_path: a/b, package: c, gguf_file: d}", "backbone: needs exactly one of"),
    (
        "{package: c}",
        "backbone.gguf_file: missing: `backbone.package` needs to know its `gguf_file` "
        "or its `folder`",
    ),
    (
        "{package: c, gguf_file: d, revision: e}",
        "backbone.revision: goes with `model_name_or_path` only",
    ),
    ("{model_name_or_path: a/b, gguf_file: d}", "backbone.gguf_file: goes with `package` only"),
    ("{package: c, gguf_file: ../d}", "backbone.gguf_file: must be the name of a file inside"),
    ("{package: c, gguf_file: /d}", "backbone.gguf_file: must be the name of a file inside"),
    ("{package: c, gguf_file: 'C:\\d'}", "backbone.gguf_file: must be the name of a file inside"),
    ("{package: c.d, gguf_file: e}", "backbone.package: must be the name of an installed package"),
    (
        "{model_name_or_path: a/b, dtype: bf16}",
        "backbone.dtype: must be one of auto, float32, bfloat16",
    ),
]


@pytest.mark.parametrize(("backbone", "message"), BACKBONES)
def test_backbones(tmp_path: Path, backbone: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text=f"{HEAD}{PFLALIGN}".replace("{model_name_or_path: org/tiny}", backbone))

    _, line = caught.value.message.splitlines()
    assert line.startswith(f"  line 2  {message}")


def test_columns_must_differ(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"client: must not be the same column as `data.client_column`"
    ):
        load(tmp_path, "data.split_column=client")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.group_column=client",), "must not be the same column as `data.client_column`"),
        (
            ("data.group_column=part", "data.split_column=part"),
            "must not be the same column as `data.split_column`",
        ),
        (
            ("data.format=mesages",),
            "must be one of auto, prompt_completion, messages, alpaca, sharegpt, text, text_label, "
            "got 'mesages'. Did you mean `messages`?",
        ),
        (
            ("data.columns={a: text, b: text}",),
            "'a' and 'b' cannot both be 'text'",
        ),
        (("data.columns={a: 1}",), "data.columns.a: expected text, got 1; put it in quotes"),
        (("data.columns={a: ''}",), "data.columns.a: must not be empty"),
        (
            ("data.columns=[a]",),
            "got a list, expected a mapping such as `columns: {question: prompt}`",
        ),
        (
            ("data.partition={name: dirichlet, num_partitions: 3, partition_by: x}",),
            "data.partition.alpha: `dirichlet` needs it, for example `alpha: 0.5`",
        ),
        (
            ("data.partition={name: iid, num_partitions: 3, alpha: 1.0}",),
            "data.partition.alpha: is an option of dirichlet, not of iid",
        ),
        (
            ("data.partition={name: natural_id, partition_by: x, num_partitions: 3}",),
            "data.partition.num_partitions: is an option of iid and dirichlet and shards, not of "
            "natural_id",
        ),
        (
            ("data.partition={name: by_size, partition_sizes: [3, 0]}",),
            "data.partition.partition_sizes[1]: must be a whole number of at least 1, got 0",
        ),
        (
            ("data.partition={name: idd, num_partitions: 3}",),
            "data.partition.name: must be one of natural_id, iid, dirichlet, shards, by_size, got "
            "'idd'. Did you mean `iid`?",
        ),
        (
            ("data.partition={name: iid, num_partitions: 3}", "data.client_column=who"),
            "must be left out: `data.client_column` names the clients",
        ),
        *(
            (
                (f"data.holdout_clients={given}",),
                f"must be a number of clients, or a list of ids such as [alice, bob], got {shown}",
            )
            for given, shown in [
                ("all", "'all'"),
                ("-1", "-1"),
                ("true", "true"),
                ("[1]", "a list"),
            ]
        ),
        *(
            (
                (f"data.partition={{name: natural_id, partition_by: {given}}}",),
                "data.partition.partition_by: must be a column, or a list of them such as "
                f"[language, topic], got {shown}",
            )
            for given, shown in [("3", "3"), ("''", "''"), ("[]", "a list"), ("[a, 1]", "a list")]
        ),
        (("data.min_train_samples=0",), "must be a whole number from 1 to 1000000, got 0"),
        (("data.on_long=cut",), "must be one of truncate, drop, error, got 'cut'"),
        (("data.truncation=true",), "unknown key. Did you mean `data.on_long`?"),
        (("data.group=doc",), "unknown key. Did you mean `data.group_column`?"),
        (("data.dataset_format=text",), "unknown key. Did you mean `data.format`?"),
    ],
)
def test_what_the_data_section_refuses(
    tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, *overrides)

    assert caught.value.message.splitlines()[1] == f"  override {overrides[0]}: {said}"

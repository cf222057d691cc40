"""What the recipe says of where data come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfl_lm.errors import RecipeError
from tests.recipe.minimal import HEAD, PFLALIGN, load

HUB = "{dataset_name: org/rows}"
PACKAGE = "{package: my_rows, data_file: rows.jsonl}"


def told(folder: Path, data: str) -> list[str]:
    text = HEAD.replace("{path: clients.jsonl}", data) + PFLALIGN
    with pytest.raises(RecipeError) as caught:
        load(folder, text=text)
    return [line.split("  ", 2)[-1] for line in caught.value.message.splitlines()[1:]]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            "{}",
            "data.path: missing. Add it, for example `path: clients.jsonl`; or name a `package`, "
            "or a `dataset_name`",
        ),
        (
            "{path: a.jsonl, dataset_name: org/rows}",
            "data: needs only one source; path and dataset_name are given",
        ),
        (
            "{package: my_rows}",
            "data.data_file: missing: `data.package` needs to know its `data_file`",
        ),
        (
            "{path: a.jsonl, data_file: b.jsonl}",
            "data.data_file: goes with `package` only, not with `path`",
        ),
        (
            "{package: my_rows, data_file: ../b.jsonl}",
            "data.data_file: must be the name of a file inside the package, got '../b.jsonl'",
        ),
        (
            "{package: my_rows, data_file: /etc/passwd}",
            "data.data_file: must be the name of a file inside the package, got '/etc/passwd'",
        ),
        (
            "{package: my.rows, data_file: b.jsonl}",
            "data.package: must be the name of an installed package, got 'my.rows'",
        ),
        *(
            (
                f"{{path: a.jsonl, {key}: x}}",
                f"data.{key}: goes with `dataset_name` only, not with `path`",
            )
            for key in (
                *("dataset_config_name", "revision", "dataset_train_split"),
                *("dataset_validation_split", "dataset_test_split"),
            )
        ),
        *(
            (
                f"{{dataset_name: {name}}}",
                f"data.dataset_name: must be a dataset's Hub id such as ORG/NAME, got '{name}'",
            )
            for name in ("json", "../rows", "a/b/c", "/etc/rows", "./rows")
        ),
        (
            "{dataset_name: org/rows, dataset_test_split: train}",
            "data.dataset_test_split: 'train' is another one's split already",
        ),
        (
            "{dataset_name: org/rows, dataset_test_split: test, split_column: split}",
            "data.split_column: must be left out: the dataset's splits say which rows are which",
        ),
        (
            "{dataset: org/rows}",
            "data.dataset: unknown key. Did you mean `data.dataset_name`?",
        ),
    ],
)
def test_a_source_that_cannot_be(tmp_path: Path, data: str, text: str) -> None:
    assert told(tmp_path, data)[0] == text


def test_sources_that_can_be(tmp_path: Path) -> None:
    for data, source in ((HUB, "org/rows"), (PACKAGE, "my_rows/rows.jsonl")):
        text = HEAD.replace("{path: clients.jsonl}", data) + PFLALIGN
        loaded = load(tmp_path, text=text)
        assert loaded.recipe.data.source == source
        assert f"{data.strip('{}').split(':')[0]}: " in loaded.resolved()


def test_the_splits_that_are_read(tmp_path: Path) -> None:
    text = HEAD.replace("{path: clients.jsonl}", HUB) + PFLALIGN
    data = load(tmp_path, "data.dataset_test_split=test[:10%]", text=text).recipe.data

    assert data.dataset_splits == {"train": "train", "test": "test[:10%]"}


def test_rows_of_a_file_instead(tmp_path: Path) -> None:
    text = HEAD.replace("{path: clients.jsonl}", HUB) + PFLALIGN
    data = load(tmp_path, "data.dataset_test_split=test", text=text).recipe.data.of_file("x.jsonl")

    assert (data.source, data.dataset_name, data.dataset_test_split) == ("x.jsonl", None, None)

"""Datasets of the Hub, through the real ``datasets``, from a Hub of our own and from its cache."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pfl_lm.data.population import read_population
from pfl_lm.errors import DataError
from pfl_lm.recipe.data import DataOptions
from tests.data.fake_datasets import COMMIT, OLD, DatasetHub, command, told
from tests.tiny import tiny_recipe

CHATS = "data.dataset_name=org/chats"
BRANCHES = "data.revision=v1"
ONLINE = {
    "whole": [CHATS, "data.dataset_test_split=test"],
    "sliced": [
        CHATS,
        "data.dataset_train_split=train[:50%]",
        "data.dataset_test_split=train[50%:]",
    ],
    "moved": ["data.dataset_name=org/moved"],
    "revision": ["data.dataset_name=org/moved", f"data.revision={OLD}"],
    "no revision": [CHATS, BRANCHES],
    "no split": [CHATS, "data.dataset_validation_split=tset"],
    "no slice": [CHATS, "data.dataset_train_split=train[:x]"],
    "parquet": [
        "data.dataset_name=org/dolly",
        "data.columns={context: input, response: output}",
        "data.partition={name: natural_id, partition_by: category}",
    ],
    "english": ["data.dataset_name=org/two", "data.dataset_config_name=en"],
    "which": ["data.dataset_name=org/two"],
    "no config": ["data.dataset_name=org/two", "data.dataset_config_name=enn"],
    "types": ["data.dataset_name=org/types"],
    "gated": ["data.dataset_name=org/gated"],
    "script": ["data.dataset_name=org/script"],
    "pictures": ["data.dataset_name=org/pictures"],
    "broken": ["data.dataset_name=org/broken"],
    "empty": ["data.dataset_name=org/empty"],
    "nowhere": ["data.dataset_name=org/nowhere"],
}
OFFLINE = {
    "whole": ONLINE["whole"],
    "revision": ["data.dataset_name=org/moved", f"data.revision={COMMIT}"],
    "branch": [CHATS, BRANCHES],
    "english": ONLINE["english"],
    "french": ["data.dataset_name=org/two", "data.dataset_config_name=fr"],
    "nowhere": ONLINE["nowhere"],
}


def rows(clients: str, n: int, **more: object) -> bytes:
    made = [
        {"client": client, "prompt": f"q{i}", "completion": f"{client} {i}"} | more
        for i in range(n)
        for client in clients
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in made)


def dolly() -> bytes:
    import pyarrow
    import pyarrow.parquet

    made = [
        {"instruction": f"i{i}", "context": "c" * (i % 2), "response": f"r{i}", "category": name}
        for i in range(8)
        for name in ("closed_qa", "open_qa")
    ]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), file)
    return file.getvalue()


TWO = b"""---
configs:
- config_name: en
  data_files: en.jsonl
- config_name: fr
  data_files: fr.jsonl
---
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[DatasetHub]:
    fake = DatasetHub()
    chats = {"train.jsonl": rows("ab", 8), "test.jsonl": rows("ab", 2)}
    fake.add("org/chats", {"README.md": b"---\n{}\n---\n", **chats})
    fake.add("org/moved", {"README.md": b"", "train.jsonl": rows("ab", 8)})
    fake.add("org/moved", {"README.md": b"", "train.jsonl": rows("abc", 4)}, OLD)
    fake.add("org/dolly", {"README.md": b"", "data/train-00000.parquet": dolly()})
    fake.add("org/two", {"README.md": TWO, "en.jsonl": rows("ab", 8), "fr.jsonl": rows("ab", 8)})
    fake.add("org/types", {"README.md": b"", "train.csv": b"client,text\n007,yes\na,\n"})
    fake.add("org/gated", {"README.md": b""})
    fake.gated.add("org/gated")
    fake.add("org/script", {"README.md": b"", "script.py": b"raise SystemExit"})
    fake.add("org/pictures", {"README.md": b"", "train.png": b"\x89PNG"})
    fake.add("org/broken", {"README.md": b"", "train.jsonl": b'{"a": [}\n'})
    fake.add("org/empty", {"README.md": b""})
    yield fake
    fake.shutdown()
    fake.server_close()
    assert not fake.unhandled


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub") / "hf"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipe(
        tmp_path_factory.mktemp("recipe"), **{"data.path": None, "data.split_column": None}
    )


@pytest.fixture(scope="module")
def online(hub: DatasetHub, home: Path, recipe: Path) -> dict[str, Any]:
    return told(recipe, ONLINE, home, hub.url)


@pytest.fixture(scope="module")
def offline(online: dict[str, Any], home: Path, recipe: Path) -> dict[str, Any]:
    """The same cache, and no Hub."""
    return told(recipe, OFFLINE, home)


def test_a_dataset_goes_the_way_of_a_file(online: dict[str, Any]) -> None:
    assert online["whole"] == {"a": [7, 1, 2], "b": [7, 1, 2]}
    assert online["sliced"] == {"a": [3, 1, 4], "b": [3, 1, 4]}
    assert online["english"] == {"a": [7, 1, 0], "b": [7, 1, 0]}
    assert online["parquet"] == {"closed_qa": [7, 1, 0], "open_qa": [7, 1, 0]}


def test_a_revision_is_read(online: dict[str, Any]) -> None:
    assert online["moved"] == {"a": [7, 1, 0], "b": [7, 1, 0]}
    assert online["revision"] == {"a": [3, 1, 0], "b": [3, 1, 0], "c": [3, 1, 0]}


def test_types_and_rows_are_checked_as_those_of_a_file(online: dict[str, Any]) -> None:
    assert online["types"] == (
        "org/types: 1 problem\n"
        "  train row 2: 'text' must be a string, got null\n"
        "  hint: a dataset of the Hub, each of its rows an example, with the client column and "
        "`text`"
    )


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (
            "no revision",
            "data.revision: Revision 'v1' doesn't exist for dataset 'org/chats' on the Hub\n"
            "  hint: name a branch, tag or commit that the dataset has",
        ),
        (
            "no split",
            "data.dataset_validation_split: org/chats has no split 'tset'. Did you mean 'test'?\n"
            "  hint: it has 'train', 'test'",
        ),
        (
            "no slice",
            "data.dataset_train_split: 'train[:x]' is not a part of a split (Unrecognized "
            "instruction format: train[:x])\n"
            "  hint: name one of 'train', 'test', or a part of it such as `train[:10%]`",
        ),
        (
            "which",
            "data.dataset_config_name: org/two has several configurations, and one must be named\n"
            "  hint: it has 'en', 'fr'",
        ),
        (
            "no config",
            "data.dataset_config_name: org/two has no configuration 'enn'. Did you mean 'en'?\n"
            "  hint: it has 'en', 'fr'",
        ),
        (
            "gated",
            "data.dataset_name: Dataset 'org/gated' is a gated dataset on the Hub. You must be "
            "authenticated to access it\n"
            "  hint: ask for access at https://huggingface.co/datasets/org/gated, then run "
            "`hf auth login`",
        ),
        (
            "script",
            "data.dataset_name: org/script comes as a script, and no code that comes with a "
            "dataset is run\n"
            "  hint: name a dataset whose files hold rows, such as Parquet",
        ),
        (
            "pictures",
            "data.dataset_name: org/pictures is a dataset of the kind 'imagefolder', which is not "
            "read. Read are json, csv, parquet, arrow, text\n"
            "  hint: name a dataset whose files hold rows",
        ),
        (
            "broken",
            "data.dataset_name: org/broken cannot be read by `datasets`: JSON parse error: "
            "Invalid value. in row 0\n"
            "  hint: see on the Hub whether its files are what they should be",
        ),
        (
            "empty",
            "data.dataset_name: org/empty cannot be read by `datasets`: The directory at "
            f"hf://datasets/org/empty@{COMMIT} doesn't contain any data files\n"
            "  hint: see on the Hub whether its files are what they should be",
        ),
        (
            "nowhere",
            "data.dataset_name: Dataset 'org/nowhere' doesn't exist on the Hub or cannot be "
            "accessed\n"
            "  hint: check the id on the Hub; for a private one run `hf auth login`",
        ),
    ],
)
def test_what_the_hub_has_not(online: dict[str, Any], case: str, text: str) -> None:
    assert online[case] == text


def test_offline_the_cache_is_read(online: dict[str, Any], offline: dict[str, Any]) -> None:
    assert offline["whole"] == online["whole"]
    assert offline["english"] == online["english"]


def test_offline_a_revision_is_read_only_if_the_cache_has_that_one(
    offline: dict[str, Any],
) -> None:
    # The cache was filled with this commit and then with an older one, which is the newest there.
    assert offline["revision"] == (
        f"data.revision: the Hub cannot be reached, and the cache has org/moved at {OLD}, which "
        f"need not be '{COMMIT}'\n"
        f"  hint: connect to the Hub, or set data.revision: {OLD}"
    )
    assert offline["branch"].startswith("data.revision: the Hub cannot be reached")


def test_offline_a_dataset_or_configuration_that_was_never_read(offline: dict[str, Any]) -> None:
    assert offline["french"] == (
        "data.dataset_config_name: the Hub cannot be reached, and the cache has org/two without "
        "its configuration 'fr'\n"
        "  hint: it has 'en'"
    )
    assert offline["nowhere"] == (
        "data.dataset_name: org/nowhere is not in the cache, and the Hub cannot be reached "
        "(HF_HUB_OFFLINE is set)\n"
        "  hint: run `pfl-lm validate` once where there is a network and HF_HUB_OFFLINE is not "
        "set; from then on the cache has it"
    )


def test_validate_says_where_the_rows_are_and_leaves_with_2_if_they_are_not(
    offline: dict[str, Any], home: Path, recipe: Path
) -> None:
    good = command("validate", str(recipe), *OFFLINE["english"], home=home)
    bad = command("validate", str(recipe), *OFFLINE["nowhere"], home=home)

    assert (good.returncode, good.stderr.strip()) == (0, "")
    assert "prompt_completion, told by its columns, from the Hub's org/two, split train" in (
        good.stdout
    )
    assert bad.returncode == 2
    assert bad.stderr.count("\n") <= 3


@pytest.fixture
def cached(offline: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache as this process sees it, offline."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")


def test_a_folder_of_the_same_name_is_not_taken_for_the_dataset(
    cached: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = DataOptions(dataset_name="org/two", dataset_config_name="en")
    assert len(read_population(options).clients) == 2

    (tmp_path / "org" / "two").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        read_population(options)
    assert str(caught.value) == (
        "data.dataset_name: 'org/two' is a file or folder here too, and `datasets` would read "
        "that one\n"
        "  hint: name it in data.path, or start from another folder"
    )


def test_what_a_split_holds_is_bounded(cached: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfl_lm.data.hub.ALWAYS", 1000)
    monkeypatch.setattr("pfl_lm.data.hub.MOST_TIMES", 1)

    with pytest.raises(DataError, match="row 1: the split holds more than 0 MiB, too much for its"):
        read_population(DataOptions(dataset_name="org/two", dataset_config_name="en"))


def test_a_run_goes_on_with_its_own_rows_only(
    cached: None, hub: DatasetHub, home: Path, recipe: Path, tmp_path: Path
) -> None:
    from pfl_lm.finetune import finetune
    from pfl_lm.preflight import preflight_resume
    from pfl_lm.recipe import load_recipe
    from pfl_lm.resume import run_recipe

    where = ["data.dataset_name=org/two", "data.dataset_config_name=en"]
    out = f"runtime.output_dir={tmp_path}"
    folder = finetune(load_recipe(recipe, [*where, out, "federation.rounds=1"])).folder
    assert preflight_resume(run_recipe(folder, 2)).keys() == {"a", "b"}

    other = rows("ab", 7) + rows("ab", 1, completion="another answer")
    hub.add("org/two", {"README.md": TWO, "en.jsonl": other, "fr.jsonl": other}, OLD)
    told(recipe, {"again": [*where, f"data.revision={OLD}"]}, home, hub.url)
    with pytest.raises(DataError) as caught:
        preflight_resume(run_recipe(folder, 2))
    assert caught.value.message == (
        "org/two: 2 problems\n"
        "  client 'a': its rows are not those the run began with\n"
        "  client 'b': its rows are not those the run began with"
    )


@pytest.mark.network
def test_dolly_is_read_from_the_real_hub() -> None:
    options = DataOptions(
        dataset_name="databricks/databricks-dolly-15k",
        dataset_train_split="train[:500]",
        columns={"context": "input", "response": "output"},
        partition={"name": "natural_id", "partition_by": "category"},
    )
    assert len(read_population(options).clients) == 8

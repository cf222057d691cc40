"""A data file inside an installed package, which is found and never imported."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

from pfl_lm.data.population import read_population
from pfl_lm.errors import DataError
from pfl_lm.recipe.data import DataOptions

ROWS = "".join(
    json.dumps({"client": client, "text": f"{client} {i}"}) + "\n"
    for client in "ab"
    for i in range(4)
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, one of them with rows; to import any of them would be an error."""
    folder = tmp_path / "site"
    for name in ("rows_of_mine", "nothing_here"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "rows_of_mine" / "data").mkdir()
    (folder / "rows_of_mine" / "data" / "clients.jsonl").write_text(ROWS)
    (folder / "one_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(folder))
    return folder


def refusal(package: str, data_file: str) -> str:
    with pytest.raises(DataError) as caught:
        read_population(DataOptions(package=package, data_file=data_file))
    return str(caught.value)


@pytest.mark.parametrize("name", ["rows_of_mine", "rows-of-mine"])
def test_its_rows_are_read_and_it_is_not_imported(site: Path, name: str) -> None:
    options = DataOptions(package=name, data_file="data/clients.jsonl")

    clients = read_population(options).clients

    assert {client: len(rows.train) for client, rows in clients.items()} == {"a": 3, "b": 3}
    assert "rows_of_mine" not in sys.modules


def test_what_is_wrong_with_its_rows_is_said_under_its_name(site: Path) -> None:
    (site / "rows_of_mine" / "bad.jsonl").write_text("{}\n")

    assert refusal("rows_of_mine", "bad.jsonl").startswith("rows_of_mine/bad.jsonl: ")


def test_a_package_that_is_not_installed(site: Path) -> None:
    assert refusal("no_such_rows", "x.jsonl") == (
        "data.package: 'no_such_rows' is not installed here\n"
        "  hint: install it with pip, where it may have another name than for `import`"
    )


def test_a_package_that_is_one_module(site: Path) -> None:
    assert refusal("one_module", "x.jsonl") == (
        "data.package: 'one_module' is one module, and has no files beside it"
    )


def test_a_file_that_is_not_in_it(site: Path) -> None:
    assert refusal("rows_of_mine", "data/client.jsonl") == (
        "data.data_file: the package 'rows_of_mine' has no file 'data/client.jsonl'. "
        "Did you mean 'data/clients.jsonl'?\n"
        "  hint: it has 'data/clients.jsonl'"
    )
    assert refusal("rows_of_mine", "data").endswith("hint: it has 'data/clients.jsonl'")
    assert "has no file" in refusal("rows_of_mine", "x" * 5000)
    assert refusal("nothing_here", "x.jsonl") == (
        "data.data_file: the package 'nothing_here' has no file 'x.jsonl'\n"
        "  hint: it has no file in one of .jsonl, .json, .csv, .parquet"
    )


def test_a_package_in_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "rows.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("zipped_rows/__init__.py", "raise SystemExit('imported')")
        file.writestr("zipped_rows/clients.jsonl", ROWS)
    monkeypatch.syspath_prepend(str(archive))

    assert refusal("zipped_rows", "clients.jsonl") == (
        f"data.package: 'zipped_rows' lies in an archive ({archive}/zipped_rows), which is not "
        "read\n"
        "  hint: install it with pip, which unpacks it"
    )


def test_a_link_out_of_it(site: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.jsonl").write_text(ROWS)
    (site / "rows_of_mine" / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")

    assert refusal("rows_of_mine", "link.jsonl") == (
        "data.data_file: 'link.jsonl' of the package 'rows_of_mine' is a link out of it\n"
        "  hint: name the file itself in data.path"
    )

"""``pfl-lm recipes``: what is there, and copies that work where they are put."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pfl_lm.cli.app import app
from pfl_lm.cli.recipes import MAKER
from pfl_lm.recipe import load_recipe
from pfl_lm.recipe import shipped as module
from pfl_lm.recipe.shipped import about, shipped_folder, shipped_recipes

FOLDER = Path(__file__).parents[2] / "recipes"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["recipes", *map(str, words)])


def test_every_recipe_is_listed_with_its_first_line() -> None:
    assert shipped_folder() == FOLDER
    names = [path.stem for path in sorted(FOLDER.glob("*.yaml"))]
    result = run("list")
    assert (result.exit_code, result.stderr) == (0, "")
    *lines, last = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == names
    for line, path in zip(lines, shipped_recipes().values(), strict=True):
        assert line.endswith(f"  {about(path)}")
        assert path.read_text().startswith(f"# {about(path)}\n")
    assert last == f"Next: pfl-lm recipes copy {names[0]}"


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_a_copy_is_valid_where_it_is_put(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "my recipes"
    result = run("copy", name, folder)
    assert (result.exit_code, result.stderr) == (0, "")
    *files, last = result.stdout.splitlines()
    if (FOLDER / name / MAKER).exists():
        assert files.pop() == f"First: python '{folder / name / MAKER}'"
    assert last == f"Next: pfl-lm validate '{folder / name}.yaml'"
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    assert sorted(map(Path, files)) == found
    for path in found:
        assert path.read_bytes() == (FOLDER / path.relative_to(folder)).read_bytes()
    words = ["validate", str(folder / f"{name}.yaml"), f"runtime.output_dir={tmp_path}"]
    checked = CliRunner().invoke(app, words)
    told = checked.stdout + checked.stderr
    if (FOLDER / name / MAKER).exists():
        assert "is valid." in told or f"there is no file '{folder / name}" in told
    elif load_recipe(folder / f"{name}.yaml").recipe.data.dataset_name is not None:
        assert "is valid." in told or "the Hub cannot be reached" in told
    else:
        assert "is valid." in told or "is not installed here" in told


def test_two_copies_may_share_their_data_and_nothing_is_overwritten(tmp_path: Path) -> None:
    assert run("copy", "quickstart", tmp_path).exit_code == 0
    assert run("copy", "compare.yaml", tmp_path).exit_code == 0
    mine = tmp_path / "quickstart.yaml"
    mine.write_text("mine\n")
    (tmp_path / "compare.yaml").unlink()
    result = run("copy", "quickstart", tmp_path)
    assert result.exit_code == 2
    assert f"{mine} is there already, and is another file" in result.stderr
    assert mine.read_text() == "mine\n"


def test_nothing_is_written_if_anything_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "wiki-tiny").mkdir()
    (tmp_path / "wiki-tiny" / "wiki_tiny.jsonl").write_text("{}\n")
    assert run("copy", "quickstart", tmp_path).exit_code == 2
    assert not (tmp_path / "quickstart.yaml").exists()


def test_a_recipe_that_is_not_there() -> None:
    result = run("copy", "quikstart")
    assert result.exit_code == 2
    assert "no recipe 'quikstart' comes with pfl-lm" in result.stderr
    assert "did you mean quickstart?" in result.stderr
    assert f"there are {', '.join(shipped_recipes())}" in run("copy", "xyz").stderr
    assert {"chat-users", "quickstart"} <= shipped_recipes().keys()


def test_an_installation_without_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.pfl_lm, "__file__", str(tmp_path / "pfl_lm" / "__init__.py"))
    result = run("list")
    assert result.exit_code == 2
    assert "this installation of pfl-lm has no recipes" in result.stderr

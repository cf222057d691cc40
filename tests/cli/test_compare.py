"""``pfl-lm compare`` at the command line."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfl_lm.cli.app import app
from tests.compare.worlds import CELLS
from tests.tiny import save_model, tiny_recipe

METHODS = ("--methods", "pflalign,fedavg:adamw@0.001/0.01")
GIVEN = (*METHODS, "--seeds", "7,3", "--rates", "0.1,0.3")


def cli(*arguments: str) -> tuple[int, list[str], str]:
    result = CliRunner().invoke(app, ["compare", *arguments])
    return result.exit_code, result.stdout.splitlines(), result.stderr


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A recipe whose comparison was run, and what was said of it. Read it only."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("done"))
    code, said, err = cli(str(recipe), *GIVEN)
    assert (code, err) == (0, "")
    return recipe, said


def test_it_says_what_it_compares_and_a_line_a_run(done: tuple[Path, list[str]]) -> None:
    recipe, said = done
    folder = recipe.parent / "runs" / "tiny-compare"
    assert said[:6] == [
        f"tiny: 3 methods, 3 clients, 2 rounds of 2 steps, seeds 7, 3; into {folder}",
        "  pflalign      pflalign, sgd, rates 0.1, 0.3",
        "  fedavg-adamw  fedavg, adamw, rates 0.001, 0.01",
        "  local         local, sgd, rates 0.1, 0.3; comes with every comparison",
        "loading the backbone onto cpu",
        "9 runs",
    ]
    for i, (name, line) in enumerate(zip(CELLS, said[6:15], strict=True), start=1):
        left = "" if i == 9 else r" · about \d+ s left"
        assert re.fullmatch(
            rf"{i}/9  {re.escape(name)} · validation \d\.\d{{3}} · \d+ s{left}", line
        )
    assert said[16] == (
        "test loss of the clients' own models, nats a supervised token: lower is better; "
    )
    assert said[-2:] == [f"{folder / 'compare.html'}", f"{folder / 'compare.csv'}"]


def test_page_and_csv_are_of_what_was_run(done: tuple[Path, list[str]]) -> None:
    folder = done[0].parent / "runs" / "tiny-compare"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("cells", "compare.csv", "compare.html"),
    ]
    with (folder / "compare.csv").open() as file:
        cells = {row["cell"] for row in csv.DictReader(file)}
    assert cells == set(CELLS)
    page = (folder / "compare.html").read_text(encoding="utf-8")
    assert "<h1>tiny-compare</h1>" in page
    assert f"pfl-lm compare {done[0]} {METHODS[0]} {METHODS[1]} --seeds 7,3 --rates 0.1,0.3" in page
    recipe = page.split("The recipe they share")[1]
    assert str(done[0].parent) not in recipe  # no places of this machine
    assert "max_steps: 2" in recipe


def test_run_again_it_runs_nothing_and_says_the_same(done: tuple[Path, list[str]]) -> None:
    recipe, said = done
    code, again, _ = cli(str(recipe), *GIVEN)
    assert code == 0
    assert again == [*said[:4], *said[15:]]
    assert cli(str(recipe), *GIVEN, "--report-only")[1] == again


def test_a_section_of_the_recipe_says_the_same(
    done: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """And an output folder, by the command line."""
    folder = done[0].parent / "runs" / "tiny-compare"
    compare = {
        "methods": [
            "pflalign",
            {
                "method": {"name": "fedavg"},
                "training": {"optimizer": "adamw", "learning_rates": [0.001, 0.01]},
            },
        ],
        "seeds": [7, 3],
        "rates": [0.1, 0.3],
    }
    recipe = tiny_recipe(tmp_path, compare=compare)
    code, said, _ = cli(str(recipe), "--output", str(folder), "--report-only")
    assert code == 0
    assert said[4:-2] == done[1][15:-2]


def test_what_is_missing_is_said_and_how_to_run_it(
    done: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(done[0].parent / "runs" / "tiny-compare", folder)
    shutil.rmtree(folder / "cells" / "local-s3-r0.3")
    (folder / "cells" / "somebody's own").mkdir()
    given = (str(done[0]), *METHODS, "--seeds", "7,3", "--rates", "0.1,0.3")
    code, said, _ = cli(*given, "--output", str(folder), "--report-only")
    assert code == 0
    assert said[-5:] == [
        "1 of 9 runs are missing: local-s3-r0.3",
        f"to run them: pfl-lm compare {' '.join(given)} --output {folder}",
        "not of this comparison, and not used: somebody's own",
        f"{folder / 'compare.html'}",
        f"{folder / 'compare.csv'}",
    ]
    page = (folder / "compare.html").read_text(encoding="utf-8")
    assert "Not complete.</strong> 1 run is missing: local-s3-r0.3" in page


def test_report_only_of_nothing_writes_nothing(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    code, said, _ = cli(str(recipe), "--methods", "fedavg", "--report-only")
    assert code == 0
    assert said[-2:] == [
        "2 of 2 runs are missing: fedavg-s7-r0.1, local-s7-r0.1",
        f"to run them: pfl-lm compare {recipe} --methods fedavg",
    ]
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tmp_path)
    given = (str(recipe), "--methods", "fedavg", "--rates", "0.1", "training.max_steps=4")

    def press(self: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(self)

    from pfl_lm.cli.cells_display import CellsDisplay

    real = CellsDisplay.step
    monkeypatch.setattr(CellsDisplay, "step", press)
    code, said, err = cli(*given)
    assert (code, err) == (130, "interrupted\n")
    assert said[-2:] == [
        "stopping after this step; once more to stop at once",
        "stopped; what is done is kept. To go on: pfl-lm compare "
        f"{recipe} training.max_steps=4 --methods fedavg --rates 0.1",
    ]
    monkeypatch.undo()
    code, said, _ = cli(*given)
    assert code == 0
    assert "2 runs" in said


def test_what_is_wrong_is_said_with_code_2_before_anything_runs(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    code, said, err = cli(str(recipe), "--methods", "fedavgg", "--seeds", "a,0", "--rates", "0")
    assert (code, said) == (2, [])
    assert err.splitlines() == [
        f"{recipe}: 3 problems",
        "  --methods fedavgg: compare.methods[0]: there is no method 'fedavgg'. Did you mean "
        "`fedavg`? There are pflalign, fedavg, fedprox, fedavgm, fedadam, scaffold, ditto, "
        "ffa_lora, fedsa_lora, rolora, flexlora, hetlora, local, recipe, in 'fedavgg'",
        "  --seeds a,0: compare.seeds[0]: expected a whole number, got 'a'",
        "  --rates 0: compare.rates[0]: must be a number greater than 0.0, got 0",
    ]
    assert not (tmp_path / "runs").exists()


def test_cells_of_another_backbone_stop_it_with_code_2(
    done: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(done[0].parent / "runs" / "tiny-compare", folder)
    shutil.rmtree(folder / "cells" / "local-s3-r0.3")
    model = save_model(tmp_path / "model", seed=1)
    code, _, err = cli(
        *(str(done[0]), *GIVEN, "--output", str(folder)),
        f"backbone.model_name_or_path={model}",
    )
    assert code == 2
    assert err.splitlines()[0] == f"{folder}: cells that do not fit this comparison: 8 problems"

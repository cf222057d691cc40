from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import pfl_lm
from pfl_lm.cli.app import app
from pfl_lm.cli.exits import exits, plain
from pfl_lm.errors import DismissedError, LostRankError, PflError
from tests.recipe.minimal import write
from tests.tiny import write_jsonl

ROOT = Path(__file__).parents[2]
HEAVY = (
    *("torch", "transformers", "peft", "lightning", "accelerate", "datasets", "evaluate"),
    *("huggingface_hub", "tokenizers", "safetensors", "gguf", "numpy", "scipy", "pandas"),
    *("matplotlib", "pyarrow", "jinja2", "tensorboard", "opacus", "psutil", "sympy"),
)
"""What help and `validate` do without: together they take ten times as long to import."""


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def run_alone(*arguments: str) -> str:
    """Run pfl-lm in a process of its own and return the names of heavy modules it imported."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['pfl-lm', *{list(arguments)!r}]\n"
        "try:\n    runpy.run_module('pfl_lm', run_name='__main__')\n"
        "except SystemExit as exit:\n    assert not exit.code, exit.code\n"
        f"print('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("verb", [(), ("finetune",), ("plan",), ("preview",), ("compare",)])
def test_help_imports_nothing_heavy(verb: tuple[str, ...]) -> None:
    assert run_alone(*verb, "--help") == "heavy:"


def test_validate_imports_nothing_heavy(tmp_path: Path, clients_jsonl: Path) -> None:
    changes = ("data.split_column=split", f"runtime.output_dir={tmp_path}")

    assert run_alone("validate", str(write(tmp_path)), *changes) == "heavy:"


def test_validate_of_the_quickstart_imports_nothing_heavy(tmp_path: Path) -> None:
    where = f"runtime.output_dir={tmp_path}"
    assert run_alone("validate", "recipes/quickstart.yaml", where) == "heavy:"


def test_validate_says_what_a_run_would_be(tmp_path: Path, clients_jsonl: Path) -> None:
    recipe = write(tmp_path)
    out = f"runtime.output_dir={tmp_path / 'my runs'}"

    code, stdout, stderr = run("validate", str(recipe), "data.split_column=split", out)

    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0] == f"{recipe} is valid."
    assert lines[1] == "  method      pflalign, 2 rounds of 3 steps"
    assert lines[2] == (
        "  data        prompt_completion, told by its columns, from 1 file of JSON Lines"
    )
    assert lines[3] == "  clients     3, with rows for train / validation / test:"
    assert all(line.endswith("  5 / 1 / 2") for line in lines[4:7])
    assert lines[7] == f"  run folder  {tmp_path / 'my runs' / 'small'}"
    assert lines[8] == f"Next: pfl-lm finetune {recipe} data.split_column=split '{out}'"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clients.jsonl", "recipe.yaml"]


def test_what_is_wrong_goes_to_stderr_as_it_is_with_code_2(tmp_path: Path) -> None:
    recipe = write(tmp_path)

    code, stdout, stderr = run(
        "validate", str(recipe), "adapter.target_modules=[[q_proj]]", "x[/b]=1"
    )

    assert (code, stdout) == (2, "")
    assert "override adapter.target_modules=[[q_proj]]: " in stderr
    assert "override x[/b]=1: unknown key" in stderr
    assert "Traceback" not in stderr


def test_debug_shows_the_traceback_of_a_users_error(tmp_path: Path) -> None:
    code, _, stderr = run("validate", str(tmp_path / "nope.yaml"), "--debug")

    assert code == 2
    assert "Traceback (most recent call last)" in stderr
    assert stderr.endswith(
        "  hint: check the spelling; a relative path starts at the current folder\n"
    )


@pytest.mark.parametrize("arguments", [(), ("validate",), ("nope",), ("validate", "--nope", "x")])
def test_usage_errors_leave_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments)[0] == 2


def test_usage_errors_are_plain_text() -> None:
    told = run("validate", "--[red]no")[2].splitlines()[-1]

    assert told.startswith("Error: No such option")
    assert "--[red]no" in told


def test_version() -> None:
    assert run("--version") == (0, f"pfl-lm {pfl_lm.__version__}\n", "")


def test_finetune_hands_over_recipe_and_overrides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(
        "pfl_lm.cli.finetune.finetune",
        lambda *given, resume: calls.append((*given, resume)),
    )
    recipe = str(tmp_path / "r.yaml")

    assert run("finetune", recipe, "a.b=1", "c=[d]", "--debug")[0] == 0
    assert run("finetune", recipe, "--resume")[0] == 0

    path = tmp_path / "r.yaml"
    assert calls == [(path, ["a.b=1", "c=[d]"], False), (path, [], True)]


def test_ids_and_folders_are_shown_escaped_and_cut(tmp_path: Path) -> None:
    client = f"\u202e{'x' * 9_999}"
    rows = [{"client": client, "text": text} for text in ("one", "two", "three")]
    write_jsonl(tmp_path / "clients.jsonl", rows)

    code, stdout, _ = run(
        "validate", str(write(tmp_path)), f'runtime.output_dir="{tmp_path}/\\e[2J"'
    )

    assert code == 0
    assert f"\n    \\u202e{'x' * 118}…  2 / 1 / 0\n" in stdout
    assert f"\n  run folder  {tmp_path}/\\x1b[2J/small\n" in stdout


ENDS = [
    (PflError("what [q_proj] is", hint="do [this]"), 2, "what [q_proj] is\n  hint: do [this]\n"),
    (
        ValueError("no [b]\nmore"),
        1,
        "this is a bug in pfl-lm (ValueError: no [b]); run again with --debug for the traceback\n",
    ),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (typer.Exit(7), 7, ""),
]


@pytest.mark.parametrize(("error", "code", "stderr"), ENDS)
def test_how_a_verb_ends(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, stderr: str
) -> None:
    with pytest.raises(typer.Exit) as caught, exits(debug=False):
        raise error

    assert caught.value.exit_code == code
    assert capsys.readouterr() == ("", stderr)


@pytest.mark.parametrize("error", [PflError("x"), ValueError("x"), KeyboardInterrupt()])
def test_debug_always_shows_a_traceback(
    capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    with pytest.raises(typer.Exit), exits(debug=True):
        raise error

    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last)")
    assert "again with --debug" not in told


@pytest.mark.parametrize(
    ("ranks", "error", "said"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, PflError("x"), "x\n"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, PflError("x"), ""),
        ({"RANK": "1"}, PflError("x"), ""),
        ({"RANK": "8", "LOCAL_RANK": "0"}, PflError("x"), "x\n"),  # another machine, other files
        ({"RANK": "1", "LOCAL_RANK": "1"}, LostRankError("x"), "x\n"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, DismissedError("x"), ""),
    ],
)
def test_one_rank_of_a_machine_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ranks: dict[str, str],
    error: PflError,
    said: str,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, number in ranks.items():
        monkeypatch.setenv(name, number)

    with pytest.raises(typer.Exit) as caught, exits(debug=False):
        raise error

    assert caught.value.exit_code == 2
    assert capsys.readouterr() == ("", said)


def test_text_of_others_cannot_act_on_the_terminal() -> None:
    assert plain("fr:Géo\u00a0é\n\x1b[31m\r😀") == "fr:Géo\u00a0é\n\\x1b[31m\\r😀"
    assert plain("a\u202eb\u2066c\u2028d\u200de\u05d0") == (
        "a\\u202eb\\u2066c\\u2028d\u200de\u05d0"
    )

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import pfl_lm.cli.preview
from pfl_lm.cli.app import app
from tests.tiny import client_rows, tiny_recipe, write_jsonl

EVIL = "\x1b[31mred\x07\r\x9b2J[bold]b[/bold] :smile: \u202eback\u2028 nice\nbob\n  rows 1"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def recipe_of(folder: Path, rows: list[dict[str, str]], **changes: Any) -> str:
    data = write_jsonl(folder / "rows.jsonl", rows)
    return str(tiny_recipe(folder, **{"data.path": str(data), **changes}))


def test_a_preview_shows_each_client_once(tmp_path: Path) -> None:
    code, stdout, stderr = run("preview", str(tiny_recipe(tmp_path)))

    assert (code, stderr) == (0, "")
    assert "\x1b" not in stdout
    head, *clients = stdout.split("\n\n")
    assert head.splitlines() == [
        "data.max_length 128; what is between ⟦ and ⟧ is supervised: the loss counts it",
        "the padding token is the end token, <|im_end|>; padding is masked by its position, so the "
        "end of an answer is learned all the same",
    ]
    assert [client.splitlines()[0] for client in clients] == ["alice", "bob", "carol"]
    lines = clients[0].splitlines()
    assert lines[1] == "  rows        5 train, 1 validation, 2 test"
    assert [line.split()[0] for line in lines[2:6]] == ["tokens", "supervised", "cut", "dropped"]
    assert lines[4:6] == ["  cut         0", "  dropped     0"]
    assert lines[6:] == [
        "  │ <|im_start|>system",
        "  │ You answer in few words.<|im_end|>",
        "  │ <|im_start|>user",
        "  │ What comes after apple (0)?<|im_end|>",
        "  │ <|im_start|>assistant",
        "  │ ⟦The pear, and then 0 of the apple.<|im_end|>⟧",
    ]


def test_nothing_is_written_and_a_finished_run_is_no_obstacle(tmp_path: Path) -> None:
    recipe = str(tiny_recipe(tmp_path))
    occupied = tmp_path / "runs" / "tiny"
    occupied.mkdir(parents=True)
    (occupied / "x").touch()
    before = sorted(tmp_path.rglob("*"))
    assert run("preview", recipe)[0] == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_only_the_tokenizer_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    def loaded(*given: object, **options: object) -> None:
        pytest.fail("more than the tokenizer was loaded")

    recipe = str(tiny_recipe(tmp_path))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", loaded)
    code, stdout, _ = run("preview", recipe)
    assert code == 0
    assert "alice" in stdout
    assert AutoConfig is not None


def test_one_client_may_be_asked_for(tmp_path: Path) -> None:
    recipe = str(tiny_recipe(tmp_path))
    code, stdout, _ = run("preview", recipe, "--client", "bob")
    assert code == 0
    assert "\nbob\n" in stdout
    assert "alice" not in stdout

    code, stdout, stderr = run("preview", recipe, "--client", "bobb")
    assert (code, stdout) == (2, "")
    assert stderr == "--client: no row is of a client 'bobb'\n  hint: there are 3: 'bob', …\n"


def test_overrides_count(tmp_path: Path) -> None:
    code, stdout, _ = run("preview", str(tiny_recipe(tmp_path)), "data.max_length=80")
    assert code == 0
    assert "  cut         5 train, 1 validation, 2 test\n" in stdout
    assert "  example     the first 80 of " in stdout
    code, _, stderr = run("preview", str(tmp_path / "recipe.yaml"), "data.max_lenght=80")
    assert code == 2
    assert "Did you mean" in stderr


def test_what_stands_twice_is_said(tmp_path: Path) -> None:
    rows = client_rows(["alice", "bob"])
    rows += [rows[0] | {"split": "test"}, rows[7], rows[0] | {"client": "bob", "split": "test"}]
    _, stdout, _ = run("preview", recipe_of(tmp_path, rows))
    _, alice, bob = stdout.split("\n\n")
    assert "  twice       1 test, equal to a row before\n" in alice
    assert "  in two      1 in train and in test\n" in alice
    assert "elsewhere" not in alice
    assert "  elsewhere   1 held out here, and in train of another client\n" in bob


@pytest.mark.parametrize("terminal", [False, True])
def test_text_of_a_row_does_not_act(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    rows = client_rows(["[red]eve"])
    for row in rows:
        row["prompt"] = row["prompt"] + EVIL
        row["completion"] = EVIL + row["completion"]
    recipe = Path(recipe_of(tmp_path, rows, **{"data.max_length": 1024}))
    screen = Console(
        file=StringIO(), highlight=False, soft_wrap=True, width=80, _environ={"TERM": "xterm"},
        force_terminal=terminal,
    )  # fmt: skip
    monkeypatch.setattr(pfl_lm.cli.preview, "Console", lambda **given: screen)

    pfl_lm.cli.preview.preview(recipe, [])

    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]eve\n" in text
    shown = "\\x1b[31mred\\x07\\r\\x9b2J[bold]b[/bold] :smile: \\u202eback\\u2028 nice"
    assert text.count(shown) == 2
    own = {"\x1b[4;32m", "\x1b[0m"} if terminal else set()
    for sequence in own:
        assert sequence in text
        text = text.replace(sequence, "")
    assert all(c.isprintable() or c == "\n" for c in text)
    assert ("⟦" in text) == (not terminal)
    after = text.split("[red]eve\n")[1].splitlines()
    assert all(line.startswith("  ") for line in after)  # no line of a row passes for ours
    assert [line for line in after if "bob" in line] == ["  │ bob", "  │ bob"]


def test_a_terminal_without_styles_gets_the_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumb = Console(file=StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    monkeypatch.setattr(pfl_lm.cli.preview, "Console", lambda **given: dumb)
    pfl_lm.cli.preview.preview(tiny_recipe(tmp_path), [])
    assert "⟦The pear" in dumb.file.getvalue()  # type: ignore[attr-defined]


def test_many_clients_are_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfl_lm.cli.preview.MOST_CLIENTS", 2)
    recipe = str(tiny_recipe(tmp_path))
    _, stdout, _ = run("preview", recipe)
    assert "\ncarol\n" not in stdout
    assert stdout.endswith("\nand 1 more clients; --client ID shows one\n")
    assert "\ncarol\n" in run("preview", recipe, "--client", "carol")[1]

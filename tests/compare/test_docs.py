"""What docs/compare.md says of labels, verdicts and commands is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pfl_lm.compare.plan import Asked, make_plan
from pfl_lm.evaluate import standings
from pfl_lm.recipe.contenders import contenders
from tests.recipe.test_compared import draft
from tests.tiny import tiny_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
LABELS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", PAGE, re.MULTILINE)
COMMANDS = re.findall(r"^pfl-lm compare (recipe\.yaml [^#\n]+)", PAGE, re.MULTILINE)


def test_there_is_something_to_check() -> None:
    assert len(LABELS) == 7
    assert len(COMMANDS) == 4


@pytest.mark.parametrize(("text", "label"), LABELS)
def test_labels(text: str, label: str) -> None:
    assert contenders(draft(f"{{methods: ['{text}']}}"))[0].label == label


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    asked = Asked([given["--methods"]], given["--seeds"], given["--rates"])
    recipe = tiny_recipe(tmp_path, **{"training.optimizer": "adamw", "method.name": "fedavg"})
    plan = make_plan(recipe, [], asked)
    assert plan.seeds == (0, 1, 2)
    assert plan.contenders[-1].label == "local"


def test_verdicts() -> None:
    code = Path(standings.__file__).read_text(encoding="utf-8")
    for said in ("better", "worse", "no difference shown", "(one seed)", "too few clients to say"):
        assert f"`{said}`" in PAGE
        assert said in code

"""What ``docs/outputs.md`` shows is what the code reads, says and takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pfl_lm.export import hub_errors, outgoing, plan, remote
from pfl_lm.export.index import parse_index

PAGE = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_index_it_shows_is_one() -> None:
    (text,) = blocks("json")

    index = parse_index(text.encode(), "docs")

    assert list(index.clients) == ["en:Arts"]


def test_its_python_is_python() -> None:
    assert len(blocks("python")) == 3
    for code in blocks("python"):
        compile(code, "docs", "exec")


def test_it_names_every_file_that_may_be_sent_first() -> None:
    sent = PAGE[PAGE.index("### What is never sent") :]

    for name in (outgoing.CONFIG, outgoing.WEIGHTS, outgoing.CARD):
        assert f"`{name}`" in sent


_CODE = "".join(Path(str(m.__file__)).read_text() for m in (hub_errors, outgoing, plan, remote))
_TABLE = PAGE[PAGE.index("### When it does not work") :]
_MESSAGES = re.findall(r"^\| `(.+?)` \|", _TABLE, re.MULTILINE)


def test_it_lists_messages() -> None:
    assert len(_MESSAGES) >= 10


@pytest.mark.parametrize("message", _MESSAGES)
def test_a_message_it_explains_exists(message: str) -> None:
    for part in re.split(r"ORG/NAME|…|\(\d+\)", message):
        assert part.strip(" :") in _CODE

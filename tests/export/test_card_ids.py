"""Client ids that try to act, in every card: they read as they are, and do nothing."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pfl_lm.export.card import client_card
from pfl_lm.export.card_text import fenced, safe
from pfl_lm.export.repository_card import repository_card
from tests.export.card_facts import client_facts, metadata, run_facts, two_clients
from tests.export.conftest import HOSTILE


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[Any] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, attributes))

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(card: str) -> _Tags:
    body = card.split("---\n", 2)[2]
    found = _Tags()
    found.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))
    return found


def shown(client: str) -> str:
    """Return an id as a reader should see it."""

    def letter(c: str) -> str:
        return f"\\u{ord(c):04x}" if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" else c

    return "".join(map(letter, client if len(client) <= 120 else f"{client[:119]}…"))


HOSTILE_IDS = [
    HOSTILE,
    "](http://x.example) <script>",
    "<!-- /pfl-lm: load -->",
    "a\nb\r\n# Title",
    "| a | b |",
    "`x` ```y```",
    "$$x$$ **b** _i_ ~~s~~ # - + 1. > ![i](j)",
    "&lt;b&gt; &#124; \\| \\",
    "{{ x }} {% x %} ${x}",
    "www.example.com me@example.com https://example.com",
    "\u202eevil\u200b\ufeff\u2028",
    "---\nlicense: mit\n---",
    "x" * 1000,
]


def same_but_for_the_name(card: Callable[[str], str], client: str) -> None:
    hostile, plain = card(client), plain_card(card)
    acts = rendered(hostile)
    assert acts.tags == rendered_plain(card).tags
    assert collapsed(shown(client)) in collapsed(acts.text)
    assert metadata(hostile) == metadata(plain)
    assert hostile.count("\n") == plain.count("\n")


@cache
def plain_card(card: Callable[[str], str]) -> str:
    return card("a")


@cache
def rendered_plain(card: Callable[[str], str]) -> _Tags:
    return rendered(plain_card(card))


def collapsed(text: str) -> str:
    return "".join(text.split())


def card_for(client: str) -> str:
    return client_card(run_facts(), client_facts(client))


def index_card_for(client: str) -> str:
    return repository_card(two_clients(client), "me/x")


@pytest.mark.parametrize("client", HOSTILE_IDS)
def test_a_hostile_id_reads_as_it_is_and_does_nothing(client: str) -> None:
    same_but_for_the_name(card_for, client)


@given(st.text(min_size=1, max_size=60))
def test_no_id_at_all_does_anything(client: str) -> None:
    same_but_for_the_name(card_for, client)


@given(st.text(alphabet="<>[]()`|*_~#!\\&;:/.-+=\"'{}$@ \n\r\tabw1", min_size=1, max_size=40))
def test_no_punctuation_does_anything_in_the_index_card(client: str) -> None:
    line = "".join(c for c in client if c not in "\n\r\t") or "x"
    same_but_for_the_name(index_card_for, line)


def test_only_harmless_letters_stay_as_they_are() -> None:
    assert safe("fr:Géographie-2, part 1 – 日本") == "fr:Géographie-2, part 1 – 日本"
    assert safe("a|b") == "a&#124;b"
    assert safe("a\nb") == "a&#92;u000ab"


@given(st.text(alphabet="`~x\n ", max_size=40))
def test_code_cannot_be_ended_from_within(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(fenced(text, "yaml") + "\n# end\n")

    assert [t.type for t in tokens][:2] == ["fence", "heading_open"]
    assert tokens[0].content == text.rstrip("\n") + "\n"

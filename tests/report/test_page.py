"""``compare.html``: one file, safe whatever a client is called, valid and readable by all."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from pfl_lm.evaluate.standings import Standings, standings
from pfl_lm.evaluate.trials import Trial
from pfl_lm.report.page import MOST_CLIENTS, Provenance, comparison_page
from tests.trials import CLIENTS, trial

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }} {% raw %}",
    "a\u202eb\u0000\x1b[31m",
    "$\\frac{1}{0}$ & 'q'",
    "http://example.org/x " + "x" * 300,
)
VOID = {"meta", "link", "br"}


class Outline(HTMLParser):
    """Notes the elements of a page, and which were not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.wrong: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def world(clients: Sequence[str] = CLIENTS, seeds: Sequence[int] = (0, 1)) -> list[Trial]:
    """Three methods, of which one diverges with the second seed."""
    draw = np.random.default_rng(0)
    base = draw.normal(3.0, 0.3, len(clients))
    found = []
    for label, gain in (("pflalign", -0.2), ("fedavg-sgd", -0.1), ("local", -0.15)):
        for seed in seeds:
            for rate in (0.1, 0.2) if seed == seeds[0] else (0.1,):
                losses = base + gain + rate + draw.normal(0, 0.05, len(clients))
                made = trial(
                    label,
                    losses.tolist(),
                    seed=seed,
                    rate=rate,
                    clients=clients,
                    rows=[12] * len(clients),
                    base=base.tolist(),
                )
                if label == "fedavg-sgd" and seed == 1:
                    made = replace(made, state="failed", reason="NaN & more", outcome=None)
                found.append(made)
    return found


def page(trials: Sequence[Trial], **more: object) -> str:
    found = standings(trials, sorted({each.seed for each in trials}))
    told = {"recipe": "name: <b>\n", "command": "pfl-lm compare r.yaml", "written": "2026-11-22"}
    origin = Provenance(**{"name": "demo-compare", **told, **more})  # type: ignore[arg-type]
    return comparison_page(found, trials, origin)


def outline(text: str) -> Outline:
    made = Outline()
    made.feed(text)
    made.close()
    return made


@pytest.fixture(scope="module")
def plain() -> str:
    return page(world())


@pytest.fixture(scope="module")
def hostile() -> str:
    return page(world(HOSTILE))


def test_it_is_well_formed_with_ids_that_are_unique_and_found(plain: str, hostile: str) -> None:
    for text in (plain, hostile):
        found = outline(text)
        assert (found.wrong, found.open) == ([], [])
        ids = [attributes["id"] for _, attributes in found.seen if "id" in attributes]
        assert len(ids) > 50
        assert len(set(ids)) == len(ids)
        named = {
            name
            for _, attributes in found.seen
            for name in (attributes.get("aria-labelledby") or "").split()
        }
        used = set(re.findall(r"url\(#([^)]+)\)", text))
        used |= {str(a["href"])[1:] for t, a in found.seen if t == "use"}
        assert named | used <= set(ids)
        assert used


def test_it_fetches_nothing_and_runs_nothing(plain: str, hostile: str) -> None:
    for text in (plain, hostile):
        found = outline(text)
        tags = {tag for tag, _ in found.seen}
        assert tags.isdisjoint({"script", "img", "iframe", "object", "embed", "form", "a", "base"})
        for tag, attributes in found.seen:
            assert not [name for name in attributes if name.startswith("on")], tag
            for name in ("src", "href", "xlink:href", "action", "data"):
                value = attributes.get(name)
                assert value is None or value.startswith("#") or (tag, value) == ("link", "data:,")
        [policy] = [a["content"] for t, a in found.seen if a.get("http-equiv")]
        assert policy == (
            "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
            "form-action 'none'"
        )
        assert text.index("Content-Security-Policy") < text.index("<style>")
        assert "@import" not in text
    assert "http" not in plain.replace("http-equiv", "")


def test_clients_are_called_by_their_names_whatever_these_are(hostile: str) -> None:
    found = outline(hostile)
    for client in HOSTILE:
        printed = "".join(c if c.isprintable() else repr(c)[1:-1] for c in client)
        assert printed in found.text
        assert f"{printed}: " in found.text  # the tip of its dot
    assert "\u202e" not in hostile
    assert "\x00" not in hostile
    assert "49" not in found.text.split("{{ 7 * 7 }}")[1][:5]


def test_everything_can_be_read_without_seeing_a_chart(plain: str) -> None:
    found = outline(plain)
    charts = [attributes for tag, attributes in found.seen if tag == "svg"]
    assert [(each["role"], each["aria-labelledby"]) for each in charts] == [
        ("img", "clients-title clients-desc"),
        ("img", "curves-title curves-desc"),
    ]
    assert "Whom each method helps and harms, one dot a client" in found.text
    assert "pflalign harms" in found.text
    assert "After the last round: pflalign 3.250, " in found.text
    assert dict(found.seen)["html"] == {"lang": "en"}
    heads = [attributes for tag, attributes in found.seen if tag == "th"]
    assert all(attributes.get("scope") in ("col", "row") for attributes in heads)
    tables = [tag for tag, _ in found.seen if tag in ("table", "caption")]
    assert tables.count("table") == tables.count("caption") == 6
    levels = [int(tag[1]) for tag, _ in found.seen if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_it_takes_on_the_colours_of_the_reader(plain: str) -> None:
    assert "@media (prefers-color-scheme: dark)" in plain
    charts = "".join(re.findall(r"<svg.*?</svg>", plain, re.DOTALL))
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", charts)) == set()
    assert {"var(--ink)", "var(--rule)", "var(--accent)", "var(--good)", "var(--bad)"} <= set(
        re.findall(r"var\(--\w+\)", charts)
    )
    assert "font-family" not in charts


def test_what_it_says_is_what_the_standings_say(plain: str) -> None:
    found: Standings = standings(world(), [0, 1])
    told = re.sub(r"\s+", " ", outline(plain).text)
    assert "3 methods, 6 clients, 2 seeds, 8 finished runs" in told
    assert "pflalign is the best by validation; it " in told
    assert "cannot be set against local training: diverged with 1 of 2 seeds." in told
    assert "fedavg-sgd-s1-r0.1 NaN & more" in told
    assert "0.1: " in told
    assert "the lowest rate tried: a lower one may be better" in told
    for (row, column), share in found.wins.items():
        words = f"{row} beats {column} in {100 * share:.0f} % of the pairs"
        assert words in plain
    assert "0123456789abcdef" * 4 in told
    assert "name: <b>" in told
    assert "Not complete" not in told


def test_what_is_missing_is_said_first() -> None:
    told = outline(page(world(), missing=("a-s0-r1", "b-s0-r1"), n_unnamed=3, strangers=("z",)))
    words = re.sub(r"\s+", " ", told.text)
    assert "Not complete. 5 runs are missing: a-s0-r1, b-s0-r1, …" in words
    assert "not usedz " in words


def test_a_page_of_nothing_is_a_page() -> None:
    trials = [trial("fedavg", state="begun"), trial("local", state="missing")]
    found = outline(page(trials))
    assert (found.wrong, found.open) == ([], [])
    assert "Nothing yet: there is nothing to set against local training." in found.text
    assert not [tag for tag, _ in found.seen if tag == "svg"]


def test_of_very_many_clients_the_first_are_listed() -> None:
    clients = [f"client {i:04}" for i in range(MOST_CLIENTS + 7)]
    text = page(world(clients, seeds=(0,)))
    assert f'<th scope="row">{clients[MOST_CLIENTS - 1]}</th>' in text
    assert f'<th scope="row">{clients[MOST_CLIENTS]}</th>' not in text
    assert "And 7 more, in compare.csv." in text


def test_the_same_trials_make_the_same_page(plain: str) -> None:
    assert page(world()) == plain

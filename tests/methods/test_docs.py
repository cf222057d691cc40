"""The methods' pages: one for each, with its options, and bytes as the methods themselves count."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pfl_lm.layout import AdapterLayout, Factor
from pfl_lm.methods import METHODS, Setup
from pfl_lm.plan.traffic import Traffic, count_traffic
from pfl_lm.recipe.methods import METHOD_OPTIONS
from tests.recipe.minimal import load

DOCS = Path(__file__).parents[2] / "docs"
INDEX = (DOCS / "methods" / "README.md").read_text(encoding="utf-8")
PAGES = {name: DOCS / "methods" / f"{name}.md" for name in METHODS} | {
    "pflalign": DOCS / "pflalign.md"
}


def section(heading: str) -> str:
    return INDEX.split(f"\n## {heading}")[1].split("\n## ")[0]


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of each row that begins with a method's name, without its link."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if match := re.match(r"\[?`(\w+)`", cells[0]):
            found[match[1]] = cells[1:]
    return found


def quickstart() -> AdapterLayout:
    """SmolLM2-135M: 576 wide, 9 heads and 3 of keys and values, r = 8 on ten layers."""
    matrices: list[tuple[str, Factor, tuple[int, ...]]] = []
    for layer in range(20, 30):
        for module, out in (("q_proj", 576), ("v_proj", 192)):
            matrices.append((f"{layer}.{module}", "A", (8, 576)))
            matrices.append((f"{layer}.{module}", "B", (out, 8)))
    return AdapterLayout.of(matrices)


def traffic(folder: Path, name: str) -> Traffic:
    recipe = load(folder, f"method.name={name}").recipe
    setup = Setup(quickstart(), 6, 0, recipe.training)
    return count_traffic(METHODS[name](recipe.method, setup), quickstart(), rounds=2)


def test_every_method_has_its_page_and_its_row() -> None:
    overview = INDEX.split("\n## ")[0]
    assert list(rows(overview)) == list(METHODS)
    for name, page in PAGES.items():
        assert page.exists()
        link = "../pflalign.md" if name == "pflalign" else f"{name}.md"
        assert f"[`{name}`]({link})" in overview


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_those_that_the_method_counts(tmp_path: Path, name: str) -> None:
    _, up, _, down, _, state, server = rows(section("What leaves a client"))[name]
    found = traffic(tmp_path, name)
    assert up == ", ".join(f"{n:,}" for n in dict.fromkeys(found.ups))
    assert down == f"{found.down:,}"
    assert state == f"{sum(found.state.values()):,}"
    assert server == f"{found.server:,}"


def test_the_sizes_it_starts_from() -> None:
    layout = quickstart()
    sizes = [int(layout.mask(factor).sum()) for factor in ("A", "B")]
    assert f"d = {layout.d:,} numbers, {sizes[0]:,} of them in A and {sizes[1]:,} in B" in INDEX


@pytest.mark.parametrize("name", METHODS)
def test_a_page_has_every_option_with_its_default_and_every_candidate(
    tmp_path: Path, name: str
) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    for option, field in METHOD_OPTIONS[name].model_fields.items():
        if option != "name":
            row = re.search(rf"^\| `{option}` \| (.*)$", text, re.MULTILINE)
            assert row is not None, option
            if name != "pflalign":  # whose table has the values of each switch
                assert row[1].startswith(f"`{field.default}`")
    for candidate in traffic(tmp_path, name).candidates:
        assert f"`{candidate}`" in text


@pytest.mark.parametrize("name", METHODS)
def test_the_first_candidate_is_said_to_be_the_methods_own(tmp_path: Path, name: str) -> None:
    first = traffic(tmp_path, name).candidates[0]
    [row] = re.findall(rf"^\| `{first}` \| .*$", section("Candidates"), re.MULTILINE)
    assert f"**`{name}`**" in row


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("pflalign", "local")])
def test_a_page_names_the_paper_that_the_options_name(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    paper = re.search(r"arXiv (\d{4}\.\d{5})", METHOD_OPTIONS[name].__doc__ or "")
    assert paper is not None
    assert f"https://arxiv.org/abs/{paper[1]}" in text
    rule = (DOCS.parent / "pfl_lm" / "methods" / f"{name}.py").read_text(encoding="utf-8")
    assert f"arXiv {paper[1]}" in rule.replace("\n", " ")

"""The pages keep to the code: links, names, snippets, signatures and the order of the rooms."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

from pfl_lm.recipe import Recipe
from pfl_lm.recipe.yaml12 import read_yaml
from tests.recipe.minimal import MINIMAL
from tests.test_rooms import ORDER

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pfl_lm"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
MANUAL = [*sorted((ROOT / "docs").rglob("*.md")), *ROOT.glob("README.md")]
PAGES = [*MANUAL, *sorted((ROOT / "recipes").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORTENED = ("data", "federation", "training")
"""Sections of which a snippet may show a part."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def blocks(path: Path, language: str) -> list[str]:
    return [
        body for tag, body in FENCE.findall(path.read_text(encoding="utf-8")) if tag == language
    ]


def anchors(path: Path) -> set[str]:
    """Return what its headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def classes() -> list[ast.ClassDef]:
    """Return every class at the top of a file of the package."""
    modules = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    return [node for module in modules for node in module.body if isinstance(node, ast.ClassDef)]


SNIPPETS = [
    pytest.param(text, id=f"{name(page)}-{i}")
    for page in MANUAL
    for i, text in enumerate(blocks(page, "yaml"))
]
CONTRACTS = [
    pytest.param(node, id=node.name)
    for text in blocks(ARCHITECTURE, "python")
    for node in ast.parse(text).body
    if isinstance(node, ast.ClassDef)
]


def test_there_is_something_to_check() -> None:
    assert len(PAGES) >= 5
    assert len(SNIPPETS) >= 2
    assert len(CONTRACTS) == 5


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    broken = []
    for target in targets:
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", MANUAL, ids=name)
def test_named_files_and_modules_exist(page: Path) -> None:
    missing = []
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.fullmatch(r"[\w./-]+\.py", code):
            if not any((folder / code).is_file() for folder in (ROOT, PACKAGE)):
                missing.append(code)
        elif re.fullmatch(r"pfl_lm(\.\w+)+", code):
            try:
                pkgutil.resolve_name(code)
            except (ImportError, AttributeError):
                missing.append(code)
    assert missing == []


@pytest.mark.parametrize("page", MANUAL, ids=name)
def test_named_tests_exist(page: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", prose(page))
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (ROOT / file).is_file() or f"\ndef {test}(" not in (ROOT / file).read_text()
    ]
    assert missing == []


@pytest.mark.parametrize("text", SNIPPETS)
def test_recipe_snippets_are_valid(text: str) -> None:
    shown = read_yaml(text.encode(), "snippet").data
    recipe = read_yaml(MINIMAL.encode(), "minimal").data
    if {"package", "dataset_name"} & shown.get("data", {}).keys():
        del recipe["data"]["path"]
    for section, value in shown.items():
        rest = recipe.get(section) if section in SHORTENED else None
        merged = isinstance(value, dict) and isinstance(rest, dict)
        recipe[section] = {**rest, **value} if merged else value
    Recipe.model_validate(recipe)


@pytest.mark.parametrize("shown", CONTRACTS)
def test_contracts_are_those_of_the_code(shown: ast.ClassDef) -> None:
    [real] = [node for node in classes() if node.name == shown.name]
    assert signatures(shown) == signatures(real)


def signatures(node: ast.ClassDef) -> list[str]:
    """Return the fields and methods of a class, each on one line, without defaults of fields."""
    found = []
    for member in node.body:
        if isinstance(member, ast.AnnAssign):
            found.append(f"{ast.unparse(member.target)}: {ast.unparse(member.annotation)}")
        elif isinstance(member, ast.FunctionDef):
            assert member.returns is not None
            arguments, returns = ast.unparse(member.args), ast.unparse(member.returns)
            found.append(f"{member.name}({arguments}) -> {returns}")
    return found


def test_the_table_of_rooms_is_in_the_order_that_imports_keep() -> None:
    table = prose(ARCHITECTURE).split("\n## Rooms\n")[1].split("\n## ")[0]
    rooms = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", table, re.MULTILINE)
    assert rooms == [room for rank in ORDER for room in rank]


def test_ci_runs_the_readmes_first_two_commands() -> None:
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("not a git checkout")
    [extraction] = re.findall(r"^mapfile .* < <\((.+)\)$", script.read_text(), re.MULTILINE)
    done = subprocess.run(
        ["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert blocks(ROOT / "README.md", "bash")[:2] == [f"{first}\n", f"{second}\n"]
    assert first.endswith("pfl-lm finetune recipes/quickstart.yaml")
    assert second.endswith("pytest")

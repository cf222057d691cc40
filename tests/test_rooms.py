"""The house as it is built: which room imports which, drawn from the source, held to the plan."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pfl_lm"
FILES = sorted(PACKAGE.rglob("*.py"))

ORDER = (
    ("errors", "seeds", "files", "sealed", "packages", "quantities"),
    ("layout",),
    ("recipe",),
    ("data",),
    ("model",),
    ("align",),
    ("privacy",),
    ("train",),
    ("methods",),
    ("evaluate",),
    ("federation",),
    ("export",),
    ("report",),
    ("plan",),
    ("resume",),
    ("preflight",),
    ("finetune",),
    ("membership",),
    ("diagnose",),
    ("compare",),
    ("bench",),
    ("cli",),
)
"""From the top: a room imports from itself and from rooms above it."""

RANK = {"": -1} | {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
RANK["__main__"] = RANK["cli"]

TORCH_FREE = (
    *("pfl_lm", "pfl_lm.recipe", "pfl_lm.errors", "pfl_lm.seeds", "pfl_lm.files"),
    *(
        "pfl_lm.sealed",
        "pfl_lm.quantities",
        "pfl_lm.recipe.reference",
        "pfl_lm.preflight",
        "pfl_lm.resume",
    ),
    *("pfl_lm.federation.history", "pfl_lm.federation.lock", "pfl_lm.cli.resume"),
    *("pfl_lm.data.sources", "pfl_lm.data.splits", "pfl_lm.cli.app"),
    *("pfl_lm.federation.availability", "pfl_lm.federation.cohort"),
    *("pfl_lm.data.preview", "pfl_lm.model.outline", "pfl_lm.cli.plan", "pfl_lm.cli.preview"),
    "pfl_lm.cli.bench",
    *("pfl_lm.compare.plan", "pfl_lm.compare.cells", "pfl_lm.compare.fit"),
)
HEAVY = ("torch", "transformers", "peft", "lightning", "accelerate", "datasets")
MOST_LINES = 450


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Return the room of ``pfl_lm.<room>.…``; the package itself has none."""
    return f"{module}.".split(".")[1]


MODULES = {module_of(file) for file in FILES}


def imports(file: Path) -> Iterator[str]:
    """Yield the modules of pfl_lm that a file imports, at its top or inside its functions.

    What stands under ``if TYPE_CHECKING`` is for the type checker and never happens.
    """
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)
        waiting += ast.iter_child_nodes(node)


def graph() -> Iterator[tuple[str, str]]:
    """Yield every import between modules of the package, as (importer, imported)."""
    for file in FILES:
        for name in imports(file):
            if name.split(".")[0] == "pfl_lm":
                yield module_of(file), name


def test_every_module_is_in_a_room() -> None:
    assert len(MODULES) > 50
    assert {room_of(module) for module in MODULES} == RANK.keys()


def test_the_graph_is_drawn_from_all_kinds_of_imports() -> None:
    edges = set(graph())
    assert ("pfl_lm.finetune", "pfl_lm.federation.rounds") in edges
    assert ("pfl_lm.cli.members", "pfl_lm.membership") in edges  # inside a function
    assert ("pfl_lm.cli.app", "pfl_lm") in edges
    assert ("pfl_lm.methods.base", "pfl_lm.train") not in edges  # for the type checker only


def test_a_room_imports_only_rooms_above_it() -> None:
    downwards = [
        f"{importer} imports {imported}"
        for importer, imported in graph()
        if room_of(importer) != room_of(imported)
        and RANK[room_of(importer)] < RANK[room_of(imported)]
    ]
    assert not downwards


def test_rooms_of_one_rank_go_in_order() -> None:
    rooms = [room for rank in ORDER for room in rank]
    backwards = [
        f"{importer} imports {imported}"
        for importer, imported in graph()
        if RANK[room_of(importer)] == RANK[room_of(imported)] != RANK["cli"]
        and rooms.index(room_of(importer)) < rooms.index(room_of(imported))
    ]
    assert not backwards


def test_preflight_looks_at_files_alone() -> None:
    used = {imported for importer, imported in graph() if importer == "pfl_lm.preflight"}
    rooms = {"errors", "recipe", "data", "model", "federation", "resume"}
    assert {room_of(module) for module in used} == rooms
    assert {m for m in used if room_of(m) in ("model", "federation")} == {
        "pfl_lm.model.gguf",
        "pfl_lm.model.package",
        "pfl_lm.model.targets",
        "pfl_lm.federation.availability",
        "pfl_lm.federation.cohort",
        "pfl_lm.federation.folder",
    }


def test_what_runs_before_a_fit_imports_no_torch() -> None:
    code = (
        f"import importlib, sys\n"
        f"for name in {TORCH_FREE!r}:\n"
        f"    importlib.import_module(name)\n"
        f"    print(name, *[heavy for heavy in {HEAVY!r} if heavy in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.stdout.splitlines() == list(TORCH_FREE), done.stderr


def test_no_file_is_too_long_to_read() -> None:
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("lora_A", {"model/adapter.py"}),
        ("pickle", set()),
        ("torch.load(", set()),
    ],
)
def test_texts_that_belong_nowhere_else(text: str, allowed: set[str]) -> None:
    found = {
        file.relative_to(PACKAGE).as_posix()
        for file in FILES
        if text in file.read_text(encoding="utf-8")
    }
    assert found == allowed


def test_only_the_command_line_prints() -> None:
    printing = {
        file.relative_to(PACKAGE).parts[0]
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo")
    }
    assert printing <= {"cli"}


def test_the_top_level_holds_what_it_must_and_nothing_else() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    top = {name.strip('"').split("/")[0] for name in listed.stdout.splitlines()}
    shown = {name for name in top if not name.startswith(".")}
    assert shown == {"pyproject.toml", "README.md", "LICENSE", "pfl_lm", "recipes", "tests", "docs"}

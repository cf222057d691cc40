"""Values, texts and names that are made to do harm, for hypothesis to choose from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

NAMES = [
    *("../escape", "../../../../etc/passwd", "/etc/passwd", "/", ".", "..", "...", "~", "~root"),
    *("a/b", "a\\b", "C:\\x", "con", "NUL.txt", "-rf", "--help", "a b", " a", "a ", "", " "),
    *("a\0b", "a\x1b[2Jb", "a\x07", "a\rb", "a\nb", "a\tb", "\x7f", "\x9b31m", "\u2028", "\ufeff"),
    *(
        "\u202egpj.exe",
        "a\u2066b",
        "\u200f",
        "e\u0301",
        "\u00e9",
        "\ufb01",
        "fi",
        "ＦＩ",
        "ß",
        "SS",
    ),
    *("\ud800", "a\udfff", "\udcff", "🦊", "\U0010ffff", "x" * 300, "x" * 10_000, "é" * 5000),
    *("alice", "Alice", "ALICE", "alice ", "alice-", "-alice", "alice.", "a'l\"ice", "$(touch x)"),
    *("; touch x", "`touch x`", "{{7*7}}", "%s%n", "<script>", "[red]x[/red]", "](http://x)"),
    *("base", "global", "default", "adapters", "federation.sqlite", "client", "__proto__", "NaN"),
    *("007", "1e3", "0x10", "null", "true", "~nobody-of-this-name/x", "file:///etc/passwd"),
]
NUMBERS: list[int | float] = [
    *(
        0,
        -1,
        1,
        2**31,
        -(2**31),
        2**63 - 1,
        2**63,
        2**64,
        -(2**63) - 1,
        10**30,
        10**399,
        -(10**399),
    ),
    *(0.0, -0.0, 0.5, -0.5, 5e-324, 1.7e308, -1.7e308, 1e-300, 1e22),
    *(float("inf"), float("-inf"), float("nan")),
]

names = st.one_of(st.sampled_from(NAMES), st.text(max_size=30))
scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(), st.floats(), names
)


def values(deepest: int = 2000) -> st.SearchStrategy[Any]:
    """Return values of any type, nested a little, or much."""
    nested = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
        max_leaves=8,
    )
    return nested | st.builds(deep, st.integers(2, deepest), st.booleans())


def deep(levels: int, mapping: bool) -> Any:
    """Return lists (or mappings) nested this deep."""
    value: Any = 1
    for _ in range(levels):
        value = {"a": value} if mapping else [value]
    return value


def workplace(root: Path) -> Path:
    """Make a folder two levels below ``root`` that has what looks like a model; return it."""
    work = root / "a" / "work"
    (work / "model").mkdir(parents=True)
    (work / "model" / "config.json").write_text("{}")
    (work / "model" / "model.safetensors").write_bytes(b"")
    return work

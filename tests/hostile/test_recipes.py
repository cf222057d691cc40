"""Recipes and overrides of strangers, through `pfl-lm validate`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.recipe.reference import Recipe
from pfl_lm.recipe.suggest import all_keys
from tests.hostile.hostile import NAMES, NUMBERS, names, scalars, values, workplace
from tests.hostile.watched import Watched, examples, report
from tests.tiny import client_rows, write_jsonl

GOOD: dict[str, Any] = {
    "name": "small",
    "seed": 1,
    "backbone": {"model_name_or_path": "./model"},
    "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1]},
    "data": {"path": "clients.jsonl", "split_column": "split", "max_length": 128},
    "federation": {"rounds": 2, "fraction_train": 0.5},
    "training": {"learning_rate": 0.1, "max_steps": 3},
    "method": {"name": "pflalign", "beta": 0.5},
    "runtime": {"output_dir": "runs"},
}
KEYS = [key for keys in all_keys().values() for key in keys]
SNIPPETS = [
    *(b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xfe\xff", b"\x1b[2J", b"\x85"),
    *(
        "\u2028".encode(),
        "\u202e".encode(),
        b"\r",
        b"\t",
        b"\n\t",
        b"\n\n",
        b"#",
        b" #",
        b": ",
        b"- ",
    ),
    *(b"&a ", b"*a", b"&a [*a]", b"<<: *a\n", b"!!python/object/apply:os.system [touch x]", b"!x "),
    *(
        b"%YAML 1.1\n---\n",
        b"%TAG ! x\n---\n",
        b"---\n",
        b"...\n",
        b"? ",
        b"? [a, b]\n: c\n",
        b"|\n",
        b">-9\n",
    ),
    *(b"'", b'"', b'"\\ud800"', b'"\\0"', b'"\\x1b[2J"', b"@", b"`", b",", b"[", b"]", b"{", b"}"),
    *(b"[" * 3000, b"{" * 3000, b"{a: " * 500, b"- " * 500, b"? " * 500, b"a: " * 3),
    *(
        b"9" * 401,
        b"9" * 5000,
        b"0x" + b"f" * 5000,
        b"0o" + b"7" * 399,
        b"1e400",
        b"1e-400",
        b"-.inf",
        b".nan",
    ),
    *(
        b"x" * 5000,
        b"k: 1\n" * 500,
        b"name: x\n",
        b"data.path: x\n",
        b"a b c: d\n",
        b"~: 1\n",
        b"1: 2\n",
    ),
]


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A folder with a recipe, its data and a model's files, which is the current folder too."""
    work = workplace(tmp_path)
    (tmp_path / "outside").write_text("outside")
    write_jsonl(work / "clients.jsonl", client_rows())
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path))
    return Watched(tmp_path, writable=(work / "recipe.yaml",))


def as_yaml(data: Any) -> bytes:
    """Write any value as YAML: JSON is a part of it, but for the numbers it does not have."""
    text = json.dumps(data, indent=1, check_circular=False)
    return text.replace("Infinity", ".inf").replace("NaN", ".nan").encode()


def test_the_recipe_that_is_changed_is_fine(recipes: Watched) -> None:
    Path("recipe.yaml").write_bytes(as_yaml(GOOD))

    assert recipes.run("validate", "recipe.yaml")[0] == 0


Change = Callable[[dict[str, Any]], None]


def _set(key: str, value: Any) -> Change:
    def change(recipe: dict[str, Any]) -> None:
        section, _, name = key.rpartition(".")
        place = recipe.setdefault(section, {}) if section else recipe
        if isinstance(place, dict):
            place[name] = value

    return change


def _drop(key: str) -> Change:
    def change(recipe: dict[str, Any]) -> None:
        section, _, name = key.rpartition(".")
        place = recipe.get(section) if section else recipe
        if isinstance(place, dict):
            place.pop(name, None)

    return change


anywhere = st.one_of(
    st.sampled_from(KEYS),
    names.map(lambda name: f"adapter.{name}"),
    names,
    st.builds("{}.{}".format, st.sampled_from(list(Recipe.model_fields)), st.sampled_from(NAMES)),
)
changes = st.one_of(
    st.builds(_set, anywhere, values()),
    st.builds(_set, st.sampled_from(KEYS), st.sampled_from(NUMBERS)),
    st.builds(_set, st.sampled_from(KEYS), st.sampled_from(NAMES)),
    st.builds(_drop, st.sampled_from(KEYS)),
)


def test_recipes_with_other_values(recipes: Watched) -> None:
    @examples(150)
    @given(st.lists(changes, min_size=1, max_size=3))
    def check(made: list[Change]) -> None:
        recipe = copy.deepcopy(GOOD)
        for change in made:
            change(recipe)
        try:
            content = as_yaml(recipe)
        except RecursionError:
            return
        Path("recipe.yaml").write_bytes(content)
        recipes.run("validate", "recipe.yaml")

    check()
    report(recipes, 120)


PATHS = [name for name in NAMES if len(name) > 100 or set("/\\~.") & set(name)]


@pytest.mark.parametrize(
    "key", ["data.path", "backbone.model_name_or_path", "backbone.gguf_file", "runtime.output_dir"]
)
def test_paths(recipes: Watched, key: str) -> None:
    for path in PATHS:
        recipe = copy.deepcopy(GOOD)
        _set(key, path)(recipe)
        if key == "backbone.gguf_file":
            recipe["backbone"] = {"package": "json", "gguf_file": path}
        Path("recipe.yaml").write_bytes(as_yaml(recipe))
        recipes.run("validate", "recipe.yaml")

    assert recipes.tried == len(PATHS) > 20


def test_recipes_with_other_bytes(recipes: Watched) -> None:
    good = "\n".join(as_yaml({key: GOOD[key]}).decode()[2:-2] for key in GOOD).replace("\n ", "\n")
    texts = [as_yaml(GOOD), good.replace('"', "").encode()]
    cuts = st.tuples(
        st.integers(0, 2000), st.integers(0, 40), st.sampled_from(SNIPPETS) | st.binary(max_size=9)
    )

    @examples(150)
    @given(st.sampled_from(texts), st.lists(cuts, min_size=1, max_size=3))
    def check(content: bytes, made: list[tuple[int, int, bytes]]) -> None:
        for at, length, snippet in made:
            at %= len(content) + 1
            content = content[:at] + snippet + content[at + length % 3 * length :]
        Path("recipe.yaml").write_bytes(content)
        recipes.run("validate", "recipe.yaml")

    check()
    report(recipes, 120)


pieces = st.one_of(
    st.sampled_from(KEYS),
    names,
    st.sampled_from(
        ["=", "==", ".", "..", "[", "]", "{", "}", "a: ", "&a", "*a", "!!int ", "#", " ", ","]
    ),
    st.sampled_from(NUMBERS).map(str),
    st.sampled_from(
        ["[" * 100, "{a: " * 50, "a." * 3000, "9" * 5000, "---", "'", '"', "|", "null"]
    ),
)


def test_overrides(recipes: Watched) -> None:
    Path("recipe.yaml").write_bytes(as_yaml(GOOD))
    meant = st.builds(
        "{}={}".format, st.sampled_from(KEYS), scalars | st.lists(pieces).map("".join)
    )
    overrides = st.one_of(meant, st.lists(pieces, max_size=6).map("".join))

    @examples(150)
    @given(st.lists(overrides, min_size=1, max_size=3))
    def check(made: list[str]) -> None:
        recipes.run("validate", "recipe.yaml", "--", *made)

    check()
    report(recipes, 120)


LARGE = {
    "control characters": b"a: " + b"\x01" * 99_000,
    "the same key": b"a: 1\n" * 9_000,
    "keys nobody knows": b"".join(b"k%d: 1\n" % i for i in range(3_000)),
    "a list of wrong items": b"adapter: {target_modules: [" + b"1," * 20_000 + b"]}",
    "modules": b"adapter: {target_modules: ["
    + b",".join(b"m%d" % i for i in range(14_000))
    + b"]}",
    "layers": b"adapter: {layers_to_transform: ["
    + b",".join(b"%d" % i for i in range(16_000))
    + b"]}",
    "anchors": b"a: [" + b"&a 1," * 9_000 + b"]",
    "aliases": b"a: &a x\nb: [" + b"*a," * 9_000 + b"]",
    "a bomb": b"a: &a [x,x]\n"
    + b"".join(b"k%d: &k%d [*k%d,*k%d]\n" % (i + 1, i + 1, i, i) for i in range(1000)),
    "a long key": b"? " + b"k" * 90_000 + b"\n: 1\n? " + b"k" * 90_000 + b"\n: 2",
    "a long value": b"name: " + b"x" * 90_000,
    "a long line": b"a: '" + b" x" * 49_000 + b"'",
    "nothing but lines": b"\n" * 99_000,
    "more than may be": b"#" * 50_000_000,
    "brackets": b"a: " + b"[" * 99_000,
    "question marks": b"? " * 49_000,
    "dashes": b"- " * 49_000,
}


@pytest.mark.parametrize("case", LARGE)
def test_large_recipes_are_refused_in_few_words(recipes: Watched, case: str) -> None:
    Path("recipe.yaml").write_bytes(LARGE[case])

    assert recipes.run("validate", "recipe.yaml")[0] == 2

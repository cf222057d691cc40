from __future__ import annotations

import math

import pytest

from pfl_lm.errors import RecipeError
from pfl_lm.recipe.yaml12 import MAX_BYTES, parse_scalar_or_flow, read_yaml

CORE_SCHEMA = [
    ("null", None),
    ("Null", None),
    ("~", None),
    ("", None),
    ("nULL", "nULL"),
    ("true", True),
    ("True", True),
    ("TRUE", True),
    ("false", False),
    ("FALSE", False),
    ("tRue", "tRue"),
    ("yes", "yes"),
    ("No", "No"),
    ("on", "on"),
    ("off", "off"),
    ("0", 0),
    ("-12", -12),
    ("+7", 7),
    ("012", 12),
    ("0o17", 15),
    ("0x1F", 31),
    ("-0x1F", "-0x1F"),
    ("0b11", "0b11"),
    ("1_000", "1_000"),
    ("12:30", "12:30"),
    ("2024-01-02", "2024-01-02"),
    ("1.5", 1.5),
    ("1e-4", 1e-4),
    ("1E+4", 1e4),
    (".5", 0.5),
    ("5.", 5.0),
    ("-.inf", -math.inf),
    (".INF", math.inf),
    ("inf", "inf"),
    ("nan", "nan"),
    (".", "."),
    ("1e", "1e"),
    ("<<", "<<"),
    ("'1'", "1"),
    ('"true"', "true"),
    ("'~'", "~"),
]


@pytest.mark.parametrize(("text", "value"), CORE_SCHEMA)
def test_plain_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    read = read_yaml(f"key: {text}\n".encode(), "r.yaml").data["key"]

    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_nan(text: str) -> None:
    read = parse_scalar_or_flow(text)

    assert isinstance(read, float)
    assert math.isnan(read)


BROKEN = [
    ("", "r.yaml: is empty"),
    ("# only a comment\n", "r.yaml: is empty"),
    ("- a\n", "r.yaml: expected keys such as `name:` at the top, got a list"),
    ("word\n", "r.yaml: expected keys such as `name:` at the top, got 'word'"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_what_is_not_a_mapping(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(text.encode(), "r.yaml")

    assert caught.value.message == message


PROBLEMS = [
    (
        "a: 1\nb: 2\na: 3\na: 4\n",
        ["3  duplicate key `a`, first on line 1", "4  duplicate key `a`, first on line 1"],
    ),
    ("x:\n  a: 1\n  'a': 2\n", ["3  duplicate key `a`, first on line 2"]),
    ("x: [{a: 1,\n  a: 2}]\n", ["2  duplicate key `a`, first on line 1"]),
    ("a: &one 1\nb: *one\n", ["1  anchor `&one`", "2  alias `*one`: write the value out"]),
    ("a: &one {b: 1}\n", ["1  anchor `&one`"]),
    ("a: !!int 1\nb: !mine x\n", ["1  tag `!!int`", "2  tag `!mine`"]),
    ("1: a\n", ["1  a key must be text, got 1; put it in quotes"]),
    ("true: a\n", ["1  a key must be text, got true; put it in quotes"]),
    ("? [a]\n: b\n", ["1  a key must be text, got a list; put it in quotes"]),
    ("a: 1\n---\nb: 1\n", ["2  a second document starts; a recipe is one document"]),
    ("a:\n\tb: 1\n", ["2  not valid YAML, column 1: found character '\\t'"]),
    ("a: b: c\n", ["1  not valid YAML, column 5: mapping values are not allowed here"]),
    ("a: @x\n", ["1  not valid YAML, column 4: found character '@'"]),
    ("a: [1, 2\n", ["2  not valid YAML, column 1: expected ',' or ']'"]),
    ("a: 1\na: 2\nb: [\n", ["2  duplicate key `a`", "4  not valid YAML"]),
    ("%YAML 1.1\n---\na: 1\n", ["1  directives are not allowed"]),
    ('a: "\\0"\n', ["1  the character U+0000 is not allowed in a value"]),
    ('a: "\\ud800"\n', ["1  the character U+D800 is not allowed in a value"]),
    ('a: "\\U00110000"\n', ["1  not valid YAML"]),
    ("a: 1\nb: \x1b\n", ["2  the character U+001B is not allowed"]),
    ("a: 1\u2028b: 1\n", ["1  the character U+2028 is not allowed"]),
    (f"a: {'9' * 401}\n", ["1  a number of 401 digits; put text in quotes"]),
    (f"a: {'[' * 32}{']' * 32}\n", ["1  nested deeper than 32 levels"]),
    ("a: 1\nb: " + "[" * 50_000, ["2  nested deeper than 32 levels"]),
]


@pytest.mark.parametrize(("text", "problems"), PROBLEMS)
def test_every_problem_is_told_with_its_line(text: str, problems: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(text.encode(), "r.yaml")

    head, *lines = caught.value.message.splitlines()
    assert head == f"r.yaml: {len(problems)} problem{'s' * (len(problems) > 1)}"
    assert len(lines) == len(problems)
    for line, problem in zip(lines, problems, strict=True):
        assert line.startswith(f"  line {problem}")


def test_bad_utf8_is_told_with_line_and_offset() -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(b"a: 1\nb: \xff\n", "r.yaml")

    assert caught.value.message.endswith("line 2  not UTF-8: byte 0xff at offset 8")


def test_the_size_limit_is_exact() -> None:
    text = b"a: 1 #"
    assert read_yaml(text.ljust(MAX_BYTES, b"x"), "r.yaml").data == {"a": 1}

    with pytest.raises(RecipeError, match="larger than 100000 bytes"):
        read_yaml(text.ljust(MAX_BYTES + 1, b"x"), "r.yaml")


def test_twenty_problems_are_listed_and_the_rest_counted() -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(b"a: 1\n" * 10_000, "r.yaml")

    lines = caught.value.message.splitlines()
    assert lines[0] == "r.yaml: 9999 problems"
    assert lines[1:3] + lines[20:] == [
        "  line 2  duplicate key `a`, first on line 1",
        "  line 3  duplicate key `a`, first on line 1",
        "  line 21  duplicate key `a`, first on line 1",
        "  ... and 9979 more",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"? {'k' * 5000}\n: 1\n? {'k' * 5000}\n: 2\n", f"duplicate key `{'k' * 57}...`, first"),
        (f"a: &{'k' * 5000} 1\n", f"anchor `&{'k' * 57}...`: not allowed"),
        (f"a: *{'k' * 5000}\n", f"alias `*{'k' * 57}...`: write the value out"),
        (f"a: !{'k' * 5000} 1\n", f"tag `!{'k' * 56}...`: not allowed"),
    ],
)
def test_long_names_are_cut_in_messages(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(text.encode(), "r.yaml")

    assert said in caught.value.message
    assert len(caught.value.message) < 200


def test_31_nested_lists_below_a_key_are_read() -> None:
    read_yaml(f"a: {'[' * 31}{']' * 31}\n".encode(), "r.yaml")


def test_lines_of_keys_and_items() -> None:
    text = "\ufeffa: 1\r\n\r\nb:\r\n  c: [x,\r\n      y]\r\n  d:\r\n    - e: 2\r\n"

    document = read_yaml(text.encode(), "r.yaml")

    assert document.data == {"a": 1, "b": {"c": ["x", "y"], "d": [{"e": 2}]}}
    assert document.lines == {
        ("a",): 1,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "c", 0): 4,
        ("b", "c", 1): 5,
        ("b", "d"): 6,
        ("b", "d", 0): 7,
        ("b", "d", 0, "e"): 7,
    }


def test_a_version_directive_of_1_2_is_fine() -> None:
    assert read_yaml(b"%YAML 1.2\n---\na: 1\n...\n", "r.yaml").data == {"a": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("1e-4", 1e-4),
        ("[q, v]", ["q", "v"]),
        ("{a: 1}", {"a": 1}),
        ("a b", "a b"),
        ("C:\\x", "C:\\x"),
        ("yes", "yes"),
        ("'#'", "#"),
        ("a#b", "a#b"),
    ],
)
def test_override_values(text: str, value: object) -> None:
    assert parse_scalar_or_flow(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b", "must be one value, a list `[a, b]` or a mapping `{a: 1}`"),
        ("- a", "must be one value, a list `[a, b]` or a mapping `{a: 1}`"),
        ("|\n a", "must be one value, a list `[a, b]` or a mapping `{a: 1}`"),
        ("--- a", "must be one value, a list `[a, b]` or a mapping `{a: 1}`"),
        ("a #b", "must be one value; put text with `#` in it in quotes"),
        ("#b", "must be one value; put text with `#` in it in quotes"),
        ("[a] # b", "must be one value; put text with `#` in it in quotes"),
        ("{a: 1, a: 2}", "duplicate key `a`, first on line 1"),
        ("&x 1", "anchor `&x`: not allowed, write values out"),
    ],
)
def test_broken_override_values(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_scalar_or_flow(text)

    assert str(caught.value) == message

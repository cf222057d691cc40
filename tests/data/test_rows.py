import json

import pytest

from pfl_lm.data.sources import read_records
from tests.data.files import FORMAT, GOOD, problems, refusal, write

LINES = {
    "not utf-8": (
        b'{"client": "\xff"}',
        "line 2: not UTF-8 (byte 0xff at byte 13)",
    ),
    "broken json": (
        '{"client": "a",}',
        None,  # the words after the column are Python's own
    ),
    "an array": ("[1]", "line 2: expected an object {...}, got an array"),
    "a string": ('"x"', "line 2: expected an object {...}, got the string 'x'"),
    "null": ("null", "line 2: expected an object {...}, got null"),
    "duplicate key": (
        '{"client": "a", "client": "b", "prompt": "p", "completion": "c"}',
        "line 2: not usable JSON (the key 'client' is there twice)",
    ),
    "too deep": ("[" * 100_000, "line 2: not usable JSON (nested too deeply)"),
    "no client": (
        {"prompt": "p", "completion": "c"},
        "line 2: lacks the column 'client' that data.client_column names. "
        "Columns there: 'prompt', 'completion'",
    ),
    "no prompt": (
        {"client": "a", "completion": "c"},
        "line 2: lacks the column 'prompt'. Columns there: 'client', 'completion'",
    ),
    "no completion": (
        {"client": "a", "prompt": "p"},
        "line 2: lacks the column 'completion' (or 'response'). Columns there: 'client', 'prompt'",
    ),
    "two completions": (
        GOOD | {"response": "c"},
        "line 2: has both 'completion' and 'response', which mean the same. Keep one",
    ),
    "prompt of another type": (
        GOOD | {"prompt": ["p"]},
        "line 2: 'prompt' must be a string, got an array",
    ),
    "response of another type": (
        {"client": "a", "prompt": "p", "response": {"x": 1}},
        "line 2: 'response' must be a string, got an object",
    ),
    "completion null": (
        GOOD | {"completion": None},
        "line 2: 'completion' must be a string, got null",
    ),
    "empty prompt": (GOOD | {"prompt": ""}, "line 2: 'prompt' is empty"),
    "blank completion": (GOOD | {"completion": " \n\t"}, "line 2: 'completion' is empty"),
    "surrogate in the prompt": (
        '{"client": "a", "prompt": "\\ud800", "completion": "c"}',
        "line 2: 'prompt' holds half a surrogate pair, which UTF-8 cannot encode",
    ),
    "surrogate in the client": (
        '{"client": "a\\udfff", "prompt": "p", "completion": "c"}',
        "line 2: 'client' holds half a surrogate pair ('a\\udfff')",
    ),
    "client true": (
        GOOD | {"client": True},
        "line 2: 'client' must be a string or a whole number, got true",
    ),
    "client null": (
        GOOD | {"client": None},
        "line 2: 'client' must be a string or a whole number, got null",
    ),
    "client 1.0": (
        GOOD | {"client": 1.0},
        "line 2: 'client' must be a string or a whole number, got the number 1.0",
    ),
    "client blank": (
        GOOD | {"client": " "},
        "line 2: 'client' is empty. Each row names its client",
    ),
    "client with NUL": (
        GOOD | {"client": "a\0b"},
        "line 2: 'client' holds a control character ('a\\x00b')",
    ),
    "client too long": (
        GOOD | {"client": "x" * 10_001},
        f"line 2: 'client' is longer than 10000 characters ('{'x' * 56}...)",
    ),
    "a long key twice": (
        f'{{"client": "a", "{"k" * 100}": 1, "{"k" * 100}": 2}}',
        f"line 2: not usable JSON (the key '{'k' * 56}... is there twice)",
    ),
    "client with a newline": (
        GOOD | {"client": "a\n"},
        "line 2: 'client' holds a control character ('a\\n')",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_is_named(tmp_path, case):
    line, expected = LINES[case]
    if expected is None:
        with pytest.raises(json.JSONDecodeError) as caught:
            json.loads(line)
        expected = f"line 2: not JSON (column {caught.value.colno}: {caught.value.msg})"

    options = write(tmp_path, GOOD, line)

    assert problems(options) == [expected]
    assert refusal(options).hint == FORMAT
    str(refusal(options)).encode()  # nothing in the message keeps a terminal from showing it


def test_a_number_too_long_for_python_is_a_problem_not_a_crash(tmp_path):
    (problem,) = problems(write(tmp_path, GOOD, '{"n": %s}' % ("9" * 5000)))
    assert problem.startswith("line 2: not usable JSON (Exceeds the limit")


def test_one_row_can_have_several_problems(tmp_path):
    assert problems(write(tmp_path, GOOD, {"client": "", "prompt": 1, "completion": "c"})) == [
        "line 2: 'client' is empty. Each row names its client",
        "line 2: 'prompt' must be a string, got the number 1",
    ]


@pytest.mark.parametrize(("first", "second"), [(1, "1"), ("1", 1)])
def test_a_client_is_a_number_or_a_string_not_both(tmp_path, first, second):
    rows = [GOOD | {"client": first}, "", *[GOOD | {"client": second}] * 2, GOOD | {"client": 2}]
    kinds = {int: "a number", str: "a string"}
    assert problems(write(tmp_path, *rows)) == [
        f"line 3: client '1' is {kinds[type(second)]} here but {kinds[type(first)]} in line 1. "
        "Keep to one"
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("valid", "'valid', not one of 'train', 'validation', 'test'. Did you mean 'validation'?"),
        ("val", "'val', not one of 'train', 'validation', 'test'. Did you mean 'validation'?"),
        ("dev", "'dev', not one of 'train', 'validation', 'test'. Did you mean 'validation'?"),
        ("Train", "'Train', not one of 'train', 'validation', 'test'. Did you mean 'train'?"),
        ("VALID", "'VALID', not one of 'train', 'validation', 'test'. Did you mean 'validation'?"),
        ("tset", "'tset', not one of 'train', 'validation', 'test'. Did you mean 'test'?"),
        ("2024", "'2024', not one of 'train', 'validation', 'test'"),
    ],
)
def test_an_unknown_split_gets_a_suggestion(tmp_path, value, expected):
    options = write(tmp_path, GOOD | {"split": "train"}, GOOD | {"split": value})
    options.split_column = "split"
    assert problems(options) == [f"line 2: 'split' is {expected}"]


def test_a_split_is_a_string(tmp_path):
    options = write(tmp_path, GOOD | {"part": "train"}, GOOD | {"part": None})
    options.split_column = "part"
    assert problems(options) == [
        "line 2: 'part' must be one of 'train', 'validation', 'test', got null"
    ]


def test_a_row_without_the_split_column(tmp_path):
    options = write(tmp_path, GOOD | {"split": "train"}, GOOD)
    options.split_column = "split"
    assert problems(options) == [
        "line 2: lacks the column 'split' that data.split_column names. "
        "Columns there: 'client', 'prompt', 'completion'"
    ]


def test_ids_of_ten_thousand_characters_are_fine_and_cut_in_messages(tmp_path):
    client = "x" * 10_000
    assert read_records(write(tmp_path, GOOD | {"client": client}))[0].client == client
    options = write(tmp_path, GOOD | {"client": client, "split": "test"})
    options.split_column = "split"
    assert problems(options) == [f"client '{'x' * 56}...: no train rows, only 1 test"]


def test_nothing_is_guessed_of_a_name_nobody_mistyped(tmp_path):
    options = write(tmp_path, GOOD | {"split": "t" * 10_000_000})
    options.split_column = "split"
    assert problems(options) == [
        f"line 1: 'split' is '{'t' * 56}..., not one of 'train', 'validation', 'test'"
    ]

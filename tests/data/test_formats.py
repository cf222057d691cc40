"""Which format a file is of, and what is wrong with a conversation or a text in it."""

from itertools import combinations, permutations

import pytest

from pfl_lm.data.content import Conversation, PromptCompletion, Text, Turn
from pfl_lm.data.formats import FORMATS
from pfl_lm.data.sources import read_records
from tests.data.files import ANY_FORMAT, GOOD, problems, refusal, write

ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "Hello"}
TALK = {"client": "a", "messages": [ASK, SAY]}
TEXT = {"client": "a", "text": "Once."}
THE_FILE = "the file is JSON Lines in UTF-8: one object a line, with the client column"


def contents(options):
    return [record.content for record in read_records(options)]


def test_each_format_is_told_by_its_columns(tmp_path):
    assert contents(write(tmp_path, GOOD)) == [PromptCompletion("p", "c")]
    assert contents(write(tmp_path, TALK)) == [
        Conversation((Turn("user", "Hi"), Turn("assistant", "Hello")))
    ]
    assert contents(write(tmp_path, TEXT)) == [Text("Once.")]


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("prompt_completion", PromptCompletion("p", "c")),
        ("messages", Conversation((Turn("user", "Hi"), Turn("assistant", "Hello")))),
        ("text", Text("Once.")),
    ],
)
def test_a_format_can_be_named(tmp_path, format, expected):
    options = write(tmp_path, GOOD | TALK | TEXT)
    options.format = format
    assert contents(options) == [expected]


def test_two_formats_are_an_error(tmp_path):
    options = write(tmp_path, GOOD, "", GOOD | {"text": "a note"})
    assert str(refusal(options)) == (
        f"{options.path}: the columns fit 2 formats, and a file is of one: "
        "prompt_completion ('prompt', first in line 1) and text ('text', first in line 3).\n"
        "  hint: set data.format to the one that is meant, for example `format: prompt_completion`"
    )


def test_rows_of_another_format_are_an_error_too(tmp_path):
    options = write(tmp_path, TALK, {"client": "a", "completion": "c", "prompt": "p"}, TEXT)
    assert refusal(options).message == (
        f"{options.path}: the columns fit 3 formats, and a file is of one: "
        "prompt_completion ('completion', first in line 2) and messages ('messages', first in "
        "line 1) and text ('text', first in line 3)."
    )


def test_a_named_format_is_that_of_every_row(tmp_path):
    options = write(tmp_path, TALK, TEXT)
    options.format = "messages"
    assert problems(options) == [
        "line 2: lacks the column 'messages'. Columns there: 'client', 'text'"
    ]
    options.format = "text"
    assert problems(options) == [
        "line 1: lacks the column 'text'. Columns there: 'client', 'messages'"
    ]
    assert refusal(options).hint == f"{THE_FILE} and `text`"


def test_half_a_prompt_and_its_completion_is_just_a_column(tmp_path):
    assert contents(write(tmp_path, TEXT | {"prompt": "Write!"})) == [Text("Once.")]
    assert contents(write(tmp_path, TALK | {"response": 3}))[0].turns[0] == Turn("user", "Hi")


def test_lines_that_cannot_be_read_tell_no_format(tmp_path):
    options = write(tmp_path, "[]", "{")
    assert len(problems(options)) == 2
    assert refusal(options).hint == ANY_FORMAT


def test_what_is_equal_is_told_by_every_part():
    one = Conversation((Turn("user", "x"), Turn("assistant", "y")))
    assert one.parts == ("user", "x", "assistant", "y")
    assert PromptCompletion("x", "y").parts == ("x", "y")
    assert Text("x").parts == ("x",)


def test_white_space_is_kept(tmp_path):
    assert contents(write(tmp_path, TEXT | {"text": " x\n"})) == [Text(" x\n")]


TEXTS = {
    "number": (3, "must be a string, got the number 3"),
    "null": (None, "must be a string, got null"),
    "blank": ("\n\t ", "is empty"),
    "surrogate": ("\ud800", "holds half a surrogate pair, which UTF-8 cannot encode"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_cannot_be_learnt(tmp_path, case):
    value, expected = TEXTS[case]
    options = write(tmp_path, TEXT, TEXT | {"text": value})
    assert problems(options) == [f"line 2: 'text' {expected}"]
    assert refusal(options).hint == f"{THE_FILE} and `text`"


@pytest.mark.parametrize("case", TEXTS)
def test_a_message_that_cannot_be_learnt(tmp_path, case):
    value, expected = TEXTS[case]
    options = write(tmp_path, TALK | {"messages": [ASK, SAY | {"content": value}]})
    assert problems(options) == [f"line 1: 'content' of message 2 {expected}"]
    assert refusal(options).hint == f"{THE_FILE} and `messages`"


A_ROLE = "'role' of message 2 is {}, not one of 'system', 'user', 'assistant'"
MESSAGES = {
    "no array": (
        "Hi",
        ["'messages' must be an array of messages, got the string 'Hi'"],
    ),
    "null": (None, ["'messages' must be an array of messages, got null"]),
    "empty": (
        [],
        ["'messages' is empty. A conversation is a question and an answer at least"],
    ),
    "more than can be rendered": (
        [ASK, SAY] * 501,
        ["'messages' holds 1002 messages. At most 1000 are read"],
    ),
    "no object": ([ASK, "Hello"], ["message 2 must be an object, got the string 'Hello'"]),
    "nothing in it": ([ASK, {}], ["message 2 lacks 'role'", "message 2 lacks 'content'"]),
    "from and value": (
        [ASK, {"from": "gpt", "value": "Hello"}],
        [
            "message 2 lacks 'role'",
            "message 2 lacks 'content'",
            "message 2 has 'from', 'value'. Only 'role' and 'content' are read",
        ],
    ),
    "more than we read": (
        [ASK, SAY | {"tool_calls": [], "name": "x"}],
        ["message 2 has 'tool_calls', 'name'. Only 'role' and 'content' are read"],
    ),
    "a tool": ([ASK, {"role": "tool", "content": "3"}, SAY], [A_ROLE.format("'tool'")]),
    "gpt": (
        [ASK, {"role": "GPT", "content": "x"}],
        [A_ROLE.format("'GPT'") + ". Did you mean 'assistant'?"],
    ),
    "human": (
        [SAY, {"role": "human", "content": "x"}],
        [A_ROLE.format("'human'") + ". Did you mean 'user'?"],
    ),
    "a slip": (
        [ASK, {"role": "assistent", "content": "x"}],
        [A_ROLE.format("'assistent'") + ". Did you mean 'assistant'?"],
    ),
    "a role of another type": (
        [ASK, {"role": 1, "content": "x"}],
        ["'role' of message 2 must be one of 'system', 'user', 'assistant', got the number 1"],
    ),
    "a role that is a list": (
        [ASK, {"role": ["user"], "content": "x"}],
        ["'role' of message 2 must be one of 'system', 'user', 'assistant', got an array"],
    ),
    "no answer": (
        [ASK, SAY, ASK],
        ["'messages' ends with a user turn. The last one must be the assistant's"],
    ),
    "the system last": (
        [ASK, {"role": "system", "content": "x"}],
        ["'messages' ends with a system turn. The last one must be the assistant's"],
    ),
    "no question": (
        [SAY, ASK, SAY],
        ["'messages' begins with an assistant turn, before anything is asked"],
    ),
    "two faults": (
        [ASK | {"content": 1}, SAY | {"role": None}],
        [
            "'content' of message 1 must be a string, got the number 1",
            "'role' of message 2 must be one of 'system', 'user', 'assistant', got null",
        ],
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_conversation_that_cannot_be_learnt(tmp_path, case):
    messages, expected = MESSAGES[case]
    options = write(tmp_path, TALK, {"client": "a", "messages": messages})
    assert problems(options) == [f"line 2: {fault}" for fault in expected]
    assert refusal(options).hint == f"{THE_FILE} and `messages`"
    str(refusal(options)).encode()


def test_what_is_null_is_not_there(tmp_path):
    row = {"client": "a", "messages": [ASK | {"name": None}, SAY]}
    assert len(contents(write(tmp_path, row))) == 1


def test_several_questions_and_a_system_turn(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    [talk] = contents(write(tmp_path, {"client": "a", "messages": [system, ASK, SAY, ASK, SAY]}))
    assert [turn.role for turn in talk.turns] == ["system", *["user", "assistant"] * 2]


def test_faults_of_the_row_and_of_its_conversation_are_told_together(tmp_path):
    assert problems(write(tmp_path, {"client": "", "messages": [ASK]})) == [
        "line 1: 'client' is empty. Each row names its client",
        "line 1: 'messages' ends with a user turn. The last one must be the assistant's",
    ]


COLUMNS = {
    "prompt_completion": {"prompt": "p", "completion": "c"},
    "messages": {"messages": [ASK, SAY]},
    "alpaca": {"instruction": "i", "output": "o"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "text": {"text": "t"},
}


def test_the_formats_are_these():
    assert (*COLUMNS, "text_label") == FORMATS  # the last is never told by its columns


@pytest.mark.parametrize(("one", "other"), list(combinations(COLUMNS, 2)))
def test_any_two_formats_are_an_error_in_one_row_or_in_two(tmp_path, one, other):
    mine, theirs = {"client": "a"} | COLUMNS[one], {"client": "a"} | COLUMNS[other]
    for rows in ([mine | theirs], [theirs | mine], [mine, theirs], [theirs, mine]):
        error = refusal(write(tmp_path, *rows))
        assert "the columns fit 2 formats, and a file is of one: " in error.message
        assert error.message.index(f"{one} (") < error.message.index(f" and {other} (")
        assert error.hint == (
            f"set data.format to the one that is meant, for example `format: {one}`"
        )


@pytest.mark.parametrize(("one", "other"), list(permutations(COLUMNS, 2)))
def test_of_two_formats_the_named_one_is_read(tmp_path, one, other):
    options = write(tmp_path, {"client": "a"} | COLUMNS[one] | COLUMNS[other])
    options.format = one
    (tmp_path / "alone").mkdir()
    alone = write(tmp_path / "alone", {"client": "a"} | COLUMNS[one])
    assert read_records(options) == read_records(alone)

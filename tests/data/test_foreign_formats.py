"""Rows as others write them: Alpaca's and ShareGPT's columns, and columns under other names."""

import pytest

from pfl_lm.data.content import Conversation, PromptCompletion, Text, Turn
from pfl_lm.data.render import render
from pfl_lm.data.sources import read_records
from tests.data.files import no_format, problems, refusal, write
from tests.data.templates import TOKENIZERS

ALPACA = {"client": "a", "instruction": "Translate.", "input": "A quince.", "output": "Un coing."}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
SHARE = {"client": "a", "conversations": [HUMAN, GPT]}


def content(options):
    [record] = read_records(options)
    return record.content, record.format


def test_an_instruction_stands_above_what_it_is_about(tmp_path):
    expected = PromptCompletion("Translate.\n\nA quince.", "Un coing.")
    assert content(write(tmp_path, ALPACA)) == (expected, "alpaca")


@pytest.mark.parametrize("given", ["", " \n", None])
def test_an_instruction_may_be_about_nothing(tmp_path, given):
    alone = PromptCompletion("Translate.", "Un coing.")
    assert content(write(tmp_path, ALPACA | {"input": given}))[0] == alone
    without = {key: value for key, value in ALPACA.items() if key != "input"}
    assert content(write(tmp_path, without))[0] == alone


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"input": 3}, "'input' must be a string, got the number 3"),
        ({"input": "\ud800"}, "'input' holds half a surrogate pair, which UTF-8 cannot encode"),
        ({"instruction": ""}, "'instruction' is empty"),
        ({"output": None}, "'output' must be a string, got null"),
    ],
)
def test_an_instruction_that_cannot_be_learnt(tmp_path, change, expected):
    assert problems(write(tmp_path, ALPACA, ALPACA | change)) == [f"line 2: {expected}"]


def test_half_an_instruction_is_completed(tmp_path):
    row = {"client": "a", "instruction": "x", "input": "y"}
    there = "Columns there: 'client', 'instruction', 'input'"
    assert problems(write(tmp_path, row)) == [f"no row has the column 'output'. {there}"]


def test_an_instruction_beside_a_text_is_two_formats(tmp_path):
    options = write(tmp_path, ALPACA | {"text": "Below is an instruction …"})
    assert "alpaca ('instruction', first in line 1) and text" in refusal(options).message
    options.format = "alpaca"
    assert content(options)[1] == "alpaca"


def test_a_conversation_of_sharegpt(tmp_path):
    system = {"from": "system", "value": "Be kind."}
    expected = Turn("system", "Be kind."), Turn("user", "Hi"), Turn("assistant", "Hello")
    row = SHARE | {"conversations": [system, HUMAN, GPT]}
    assert content(write(tmp_path, row)) == (Conversation(expected), "sharegpt")


def test_sharegpt_may_say_user_and_assistant(tmp_path):
    said = [HUMAN | {"from": "user"}, GPT | {"from": "assistant"}]
    expected = Conversation((Turn("user", "Hi"), Turn("assistant", "Hello")))
    assert content(write(tmp_path, SHARE | {"conversations": said}))[0] == expected


ROLES = "'system', 'human', 'gpt', 'user', 'assistant'"
FAULTS = {
    "a bot": (
        [HUMAN, GPT | {"from": "bot"}],
        f"'from' of message 2 is 'bot', not one of {ROLES}. Did you mean 'gpt'?",
    ),
    "a prompter": (
        [HUMAN | {"from": "prompter"}, GPT],
        f"'from' of message 1 is 'prompter', not one of {ROLES}. Did you mean 'human'?",
    ),
    "a tool": (
        [HUMAN, {"from": "tool", "value": "3"}, GPT],
        f"'from' of message 2 is 'tool', not one of {ROLES}",
    ),
    "no answer": (
        [HUMAN, GPT, HUMAN],
        "'conversations' ends with a human turn. The last one must be the assistant's",
    ),
    "no answer to a user": (
        [HUMAN, GPT, HUMAN | {"from": "user"}],
        "'conversations' ends with a user turn. The last one must be the assistant's",
    ),
    "no question": (
        [GPT | {"from": "assistant"}, HUMAN, GPT],
        "'conversations' begins with an assistant turn, before anything is asked",
    ),
    "no list": ("Hi", "'conversations' must be an array of messages, got the string 'Hi'"),
    "more than can be rendered": (
        [HUMAN, GPT] * 501,
        "'conversations' holds 1002 messages. At most 1000 are read",
    ),
    "more than is read": (
        [HUMAN, GPT | {"weight": 0}],
        "message 2 has 'weight'. Only 'from' and 'value' are read",
    ),
    "no value": ([HUMAN, {"from": "gpt"}], "message 2 lacks 'value'"),
    "nothing said": ([HUMAN, GPT | {"value": " "}], "'value' of message 2 is empty"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_conversation_of_sharegpt_that_cannot_be_learnt(tmp_path, case):
    said, expected = FAULTS[case]
    assert problems(write(tmp_path, SHARE | {"conversations": said})) == [f"line 1: {expected}"]


def test_messages_in_a_column_of_sharegpt_are_renamed(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    options = write(tmp_path, SHARE | {"conversations": talk})
    assert len(problems(options)[0].split(";")) == 1
    options.columns = {"conversations": "messages"}
    assert content(options)[1] == "messages"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("row", [ALPACA, SHARE], ids=["alpaca", "sharegpt"])
def test_the_masks_are_those_of_the_same_conversation(tmp_path, name, row):
    tokenizer = TOKENIZERS[name]
    asked, said = ("Translate.\n\nA quince.", "Un coing.") if row is ALPACA else ("Hi", "Hello")
    found, _ = content(write(tmp_path, row))
    example = render(tokenizer, found)
    assert example == render(tokenizer, PromptCompletion(asked, said))
    [(first, last)] = example.spans
    assert tokenizer.decode(example.input_ids[first:last]).lstrip().startswith(said)
    assert asked in tokenizer.decode(example.input_ids[:first])


DOLLY = {"who": "a", "instruction": "Name it.", "context": "A fruit.", "response": "A quince."}


def test_columns_are_read_under_other_names(tmp_path):
    options = write(tmp_path, DOLLY)
    options.columns = {"who": "client", "context": "input", "response": "output"}
    assert content(options) == (PromptCompletion("Name it.\n\nA fruit.", "A quince."), "alpaca")


def test_two_columns_may_change_names(tmp_path):
    options = write(tmp_path, {"client": "a", "prompt": "answer", "completion": "question"})
    options.columns = {"prompt": "completion", "completion": "prompt"}
    assert content(options)[0] == PromptCompletion("question", "answer")


def test_a_name_that_is_taken(tmp_path):
    options = write(tmp_path, {"client": "a", "body": "x"}, {"client": "a", "body": "", "text": 1})
    options.columns = {"body": "text"}
    expected = "line 2: 'body' is to be read as 'text', and there is a 'text' too"
    assert problems(options) == [expected]


def test_a_column_that_is_nowhere(tmp_path):
    options = write(tmp_path, {"client": "a", "body": "x"})
    options.columns = {"boddy": "text", "speaker": "client"}
    there = "Columns there: 'client', 'body'"
    assert problems(options) == [
        f"no row has the column 'boddy' that data.columns renames. {there}. Did you mean 'body'?",
        f"no row has the column 'speaker' that data.columns renames. {there}",
    ]
    assert refusal(options).hint == "data.columns says `theirs: ours`: first the file's name"


def test_some_rows_may_lack_a_column_that_is_renamed(tmp_path):
    options = write(tmp_path, {"client": "a", "body": "x"}, {"client": "a", "text": "y"})
    options.columns = {"body": "text"}
    assert [record.content for record in read_records(options)] == [Text("x"), Text("y")]


def test_lines_that_cannot_be_read_are_told_first(tmp_path):
    options = write(tmp_path, "{")
    options.columns = {"body": "text"}
    assert problems(options)[0].startswith("line 1: not JSON")


def test_columns_that_fit_no_format_are_told_under_our_names(tmp_path):
    options = write(tmp_path, {"client": "a", "body": "x"})
    options.columns = {"body": "words"}
    assert problems(options) == [no_format("'client', 'words'")]

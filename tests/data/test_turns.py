"""Conversations of several turns: each answer is marked, with the token that ends its turn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.data.chat import render_turns
from pfl_lm.data.content import Turn
from pfl_lm.errors import DataError
from tests.data.templates import TOKENIZERS, render, smollm2
from tests.tiny import END, make_tokenizer

TALK = (
    ("system", "Be kind."),
    ("user", "Hi"),
    ("assistant", "Hello the world!"),
    ("user", " And the end? "),
    ("assistant", " Grüße 🧑‍🚀\n"),
)


def turns(*pairs):
    return tuple(Turn(role, content) for role, content in pairs)


def template_ids(tokenizer, conversation):
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def spoken(tokenizer, example):
    return [tokenizer.decode(example.input_ids[i:j]) for i, j in example.spans]


def unspoken(tokenizer, example):
    """The stretches that are read only."""
    borders = [0, *(i for span in example.spans for i in span), len(example.input_ids)]
    pairs = zip(borders[::2], borders[1::2], strict=True)
    return [tokenizer.decode(example.input_ids[i:j]) for i, j in pairs]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["Hello the world!<|im_end|>", " Grüße 🧑‍🚀\n<|im_end|>"]),
        ("llama-3", ["Hello the world!<|eot_id|>", "Grüße 🧑‍🚀<|eot_id|>"]),
        ("gemma", ["Hello the world!<end_of_turn>", "Grüße 🧑‍🚀<end_of_turn>"]),
        (
            "plain",
            ["Hello the world!", " Grüße 🧑‍🚀\n\n"],
        ),  # two of the three newlines are one token
    ],
)
def test_what_is_supervised(name, expected):
    tokenizer = TOKENIZERS[name]
    example = render_turns(tokenizer, turns(*TALK))
    assert spoken(tokenizer, example) == expected
    assert list(example.input_ids) == template_ids(tokenizer, turns(*TALK))


def test_what_is_not_supervised():
    tokenizer = TOKENIZERS["llama-3"]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    user, assistant = header.format("user"), header.format("assistant")
    system = f"<|begin_of_text|>{header.format('system')}Be kind.<|eot_id|>"
    assert unspoken(tokenizer, render_turns(tokenizer, turns(*TALK))) == [
        f"{system}{user}Hi<|eot_id|>{assistant}",
        f"{user}And the end?<|eot_id|>{assistant}",
        "",
    ]


def test_an_answer_may_quote_the_end_of_a_turn():
    tokenizer = TOKENIZERS["chatml"]
    answer = f"It is {END}\n<|im_start|>user\nno"
    talk = turns(("user", END), ("assistant", answer), ("user", "so?"), ("assistant", END))
    assert spoken(tokenizer, render_turns(tokenizer, talk)) == [answer + END, END + END]


def test_two_turns_are_a_prompt_and_its_completion():
    tokenizer = TOKENIZERS["gemma"]
    talk = turns(("user", "Hi"), ("assistant", "Hello"))
    assert render_turns(tokenizer, talk) == render(tokenizer, "Hi", "Hello")


def test_the_assistant_may_speak_twice_and_after_the_system_alone():
    tokenizer = TOKENIZERS["chatml"]
    talk = turns(("system", "x"), ("assistant", "one"), ("assistant", "two"), ("user", "y"))
    talk = (*talk, Turn("assistant", "three"))
    assert spoken(tokenizer, render_turns(tokenizer, talk)) == [
        f"one{END}",
        f"two{END}",
        f"three{END}",
    ]


def test_where_no_token_ends_a_turn_the_next_one_is_not_taken_for_it():
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert spoken(tokenizer, render_turns(tokenizer, turns(*TALK)))[0] == "Hello the world!"


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
talks = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", END), ("llama-3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("mistral", "</s>")],
)
@given(talk=talks)
def test_every_answer_is_supervised_and_nothing_else(name, end, talk):
    tokenizer = TOKENIZERS[name]
    conversation = turns(
        *[turn for q, a in talk for turn in (("user", q), ("assistant", a))],
    )
    example = render_turns(tokenizer, conversation)
    assert list(example.input_ids) == template_ids(tokenizer, conversation)
    said = spoken(tokenizer, example)
    if name == "chatml":  # only what merges with the header's last newline may be missing
        for (_, answer), one in zip(talk, said, strict=True):
            assert (answer + end).endswith(one)
            assert not (answer + end).removesuffix(one).strip("\n")
    else:
        lead = " " if name == "mistral" else ""
        assert said == [f"{lead}{answer.strip()}{end}" for _, answer in talk]


HINT = (
    "training needs a template that writes a conversation from front to back and leaves the answer "
    "as it is; put one that does into the backbone's folder (chat_template.jinja)"
)


def refusal(template, name=""):
    tokenizer = make_tokenizer(template)
    tokenizer.name_or_path = name
    with pytest.raises(DataError) as caught:
        render_turns(tokenizer, turns(*TALK))
    assert caught.value.hint == HINT
    return caught.value.message


# As Qwen3's: what the assistant thought is written in its last turn only.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns():
    rest = (
        "writes the first 3 messages differently once more follow, so the answers' tokens cannot "
        "be told from the rest."
    )
    assert refusal(FORGETFUL) == f"the chat template {rest}"
    assert refusal(FORGETFUL, "org/model") == f"the chat template of 'org/model' {rest}"


def test_the_same_template_writes_a_single_answer_well_enough():
    example = render(make_tokenizer(FORGETFUL), "Hi", "Hello")
    assert spoken(make_tokenizer(), example) == [f"Hello{END}"]


def test_a_template_that_writes_the_header_differently_before_an_answer():
    template = FORGETFUL.replace(
        "{% if m.role == 'assistant' and loop.last %}<think></think>", "{% if 0 %}"
    )
    assert refusal(template) == (
        "the chat template writes the prompt differently once the answer follows, so the answer's "
        "tokens cannot be told from the prompt's."
    )


def test_a_template_that_leaves_earlier_turns_out():
    template = "{% for m in messages[-2:] %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    assert refusal(template).startswith("the chat template writes the first 3 messages differently")


def test_a_template_that_writes_less_while_it_waits_for_an_answer():
    """Were the second answer looked for in the first, its tokens would count twice."""
    template = (
        "{% if add_generation_prompt %}{% set messages = messages[:1] %}{% endif %}"
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer = make_tokenizer(template)
    talk = turns(("user", "x"), ("assistant", "a"), ("user", "x"), ("assistant", "a"))
    with pytest.raises(DataError, match="writes the first 4 messages differently"):
        render_turns(tokenizer, talk)


@pytest.mark.slow
def test_with_the_tokenizer_of_smollm2():
    tokenizer = smollm2()
    example = render_turns(tokenizer, turns(*TALK))
    assert list(example.input_ids) == template_ids(tokenizer, turns(*TALK))
    assert spoken(tokenizer, example) == [f"Hello the world!{END}", f" Grüße 🧑‍🚀\n{END}"]

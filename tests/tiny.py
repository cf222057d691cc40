"""A whole world in miniature for the tests: a backbone, a few clients, a recipe; no network.

Everything heavy is imported inside the functions, so that importing this file costs nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

USER, END = "<|im_start|>", "<|im_end|>"

# As SmolLM2 has it: a system turn of its own unless one is given, and a newline after each turn.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou answer in few words.<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Pairs merged by the byte-level BPE: Ġ is a space and Ċ a newline there.
MERGES = (
    *(("Ċ", "Ċ"), ("Ġ", "Ġ"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a")),
    *(("a", "n"), ("e", "r"), ("o", "n"), ("Ġ", "i"), ("e", "s"), ("o", "u"), ("Ġ", "w")),
)
WORDS: Mapping[str, tuple[str, ...]] = {
    "alice": ("apple", "pear", "plum", "cherry", "quince"),
    "bob": ("granite", "basalt", "marble", "slate", "chalk"),
    "carol": ("violin", "cello", "harp", "flute", "drum"),
}


def make_tokenizer(
    template: str | None = CHATML,
    *,
    specials: Iterable[str] = (USER, END),
    bos: str | None = USER,
    eos: str | None = END,
    trim_offsets: bool = False,
    prepend_bos: bool = False,
) -> Any:
    """Return a fast byte-level BPE tokenizer whose padding token is its ``eos`` token.

    As in Llama 3, ``trim_offsets`` leaves spaces out of the offsets, and ``prepend_bos`` puts the
    ``bos`` token first unless a call says ``add_special_tokens=False``.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *map("".join, MERGES)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    if prepend_bos:
        backend.post_processor = processors.Sequence(
            [
                backend.post_processor,
                processors.TemplateProcessing(
                    single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
                ),
            ]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos
    )
    tokenizer.chat_template = template
    return tokenizer


def save_model(folder: Path, *, n_layers: int = 2, seed: int = 0) -> Path:
    """Write a random Llama and its tokenizer to ``folder`` as Hugging Face has them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def tiny_model() -> Path:
    """Return the folder of a two-layer backbone, made at the first call, gone with the process."""
    keeper = tempfile.TemporaryDirectory(prefix="pfl-lm-tiny-")
    _KEPT.append(keeper)
    return save_model(Path(keeper.name) / "tiny-llama")


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def client_rows(clients: Iterable[str] = WORDS, *, n_rows: int = 8) -> list[dict[str, str]]:
    """Return ``n_rows`` rows of each client, the last quarter of them test rows.

    A client outside ``WORDS`` talks of numbered things of its own.
    """
    rows = []
    for client in clients:
        words = WORDS.get(client, tuple(f"{client}-{i}" for i in range(5)))
        for i in range(n_rows):
            word, other = words[i % len(words)], words[(i // len(words) + i + 1) % len(words)]
            rows.append(
                {
                    "client": client,
                    "prompt": f"What comes after {word} ({i})?",
                    "completion": f"The {other}, and then {i} of the {word}.",
                    "split": "test" if i >= n_rows - n_rows // 4 else "train",
                }
            )
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """Write one JSON object a line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def tiny_recipe(tmp_path: Path, **changes: Any) -> Path:
    """Write ``tmp_path/recipe.yaml`` for the tiny backbone and data, and return its path.

    Changes are named by dotted keys: ``tiny_recipe(tmp_path, **{"training.max_steps": 3})``.
    """
    import yaml

    recipe: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "backbone": {"dtype": "float32"},
        "data": {"client_column": "client", "split_column": "split", "max_length": 128},
        "federation": {"rounds": 2},
        "training": {
            "learning_rate": 0.1,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "optimizer": "sgd",
        },
        "method": {"name": "pflalign"},
        "runtime": {"output_dir": str(tmp_path / "runs"), "threads": 1, "token_cache": "off"},
    }
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    if not {"model_name_or_path", "package"} & recipe["backbone"].keys():
        recipe["backbone"]["model_name_or_path"] = str(tiny_model())
    if not {"path", "package", "dataset_name"} & recipe["data"].keys():
        recipe["data"]["path"] = str(write_jsonl(tmp_path / "clients.jsonl", client_rows()))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path

"""Tiny models of every task, and rows of theirs: an encoder, a decoder, an encoder with a decoder.

The encoder drops states out while it trains, as real ones do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from tests.tiny import WORDS, save_model, tiny_recipe, write_jsonl

_KEPT: list[tempfile.TemporaryDirectory[str]] = []
LABELS = ("fruit", "music", "stone")
OF_CLIENT = {"alice": "fruit", "bob": "stone", "carol": "music"}


def _folder(name: str) -> Path:
    keeper = tempfile.TemporaryDirectory(prefix=f"pfl-lm-{name}-")
    _KEPT.append(keeper)
    return Path(keeper.name) / name


def word_tokenizer(template: str = "[CLS] $A [SEP]") -> Any:
    """Return a fast tokenizer of letters and known words that writes ``template`` around a text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for known in WORDS.values() for word in known})
    letters = sorted("abcdefghijklmnopqrstuvwxyz0123456789.,?-()")
    pieces = [*specials, *words, *letters, *(f"##{letter}" for letter in letters)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    used = [(name, vocab[name]) for name in ("[CLS]", "[SEP]") if name in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        mask_token="[MASK]",
    )


def _save(folder: Path, model_class: Any, config: Any, tokenizer: Any) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def tiny_encoder(dropout: float = 0.1) -> Path:
    """Return the folder of a two-layer BERT without a head."""
    from transformers import BertConfig, BertModel

    tokenizer = word_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=160,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )
    return _save(_folder("tiny-bert"), BertModel, config, tokenizer)


@cache
def tiny_roberta() -> Path:
    """Return the folder of a two-layer RoBERTa, whose classification head has two layers."""
    from transformers import RobertaConfig, RobertaModel

    tokenizer = word_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=160,
        pad_token_id=0,
    )
    return _save(_folder("tiny-roberta"), RobertaModel, config, tokenizer)


@cache
def tiny_decoder() -> Path:
    """Return the folder of the tiny Llama of all other tests."""
    return save_model(_folder("tiny-llama"))


@cache
def tiny_t5() -> Path:
    """Return the folder of a T5 with two layers on each side."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = word_tokenizer("$A [SEP]")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.1,
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=0,
    )
    return _save(_folder("tiny-t5"), T5ForConditionalGeneration, config, tokenizer)


def labelled_rows(clients: Iterable[str] = WORDS, *, n_rows: int = 12) -> list[dict[str, str]]:
    """Return rows of three classes for each client, the last quarter of them test rows."""
    classes = {OF_CLIENT[name]: words for name, words in WORDS.items()}
    rows = []
    for client in clients:
        own = OF_CLIENT[client]
        for i in range(n_rows):
            label = LABELS[i % 3] if i % 2 else own
            word = classes[label][i % 5]
            tail = " and then some more of it, for this row is longer" if i % 4 == 1 else ""
            rows.append(
                {
                    "client": client,
                    "text": f"It is a {word} ({i}){tail}.",
                    "label": label,
                    "split": "test" if i >= n_rows - n_rows // 4 else "train",
                }
            )
    return rows


def classification(folder: Path, **changes: Any) -> Path:
    """Write a recipe of three clients, three classes and the tiny encoder to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    ours: dict[str, Any] = {
        "task": "sequence_classification",
        "data.max_length": 128,
        "method.name": "fedavg",
        "training.learning_rate": 0.02,
        "training.optimizer": "adamw",
        "training.max_steps": 3,
    }
    if "backbone.model_name_or_path" not in changes and "backbone.package" not in changes:
        ours["backbone.model_name_or_path"] = str(tiny_encoder())
    if "data.path" not in changes:
        ours["data.path"] = str(write_jsonl(folder / "rows.jsonl", labelled_rows()))
    return tiny_recipe(folder, **{**ours, **changes})

"""Classes of texts, end to end: what is learnt, what is exported, and what it must equal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pfl_lm.data.batches import collate, training_batches
from pfl_lm.data.content import Labelled
from pfl_lm.data.render import render
from pfl_lm.finetune import RunResult, finetune
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import Backbone, load_backbone
from pfl_lm.model.states import TrunkStates
from pfl_lm.recipe import AdapterOptions, BackboneOptions, Task, load_recipe
from pfl_lm.seeds import derive_seed
from pfl_lm.train.loss import guessed, mean_nll_by_row, nll_by_row, nll_sum
from tests.runs import scored
from tests.tasks.worlds import (
    LABELS,
    classification,
    labelled_rows,
    tiny_decoder,
    tiny_encoder,
    tiny_roberta,
    word_tokenizer,
)
from tests.tiny import write_jsonl

BACKBONES = {"bert": tiny_encoder, "roberta": tiny_roberta, "llama": tiny_decoder}
CPU = torch.device("cpu")


def run(folder: Path, **changes: Any) -> RunResult:
    return finetune(load_recipe(classification(folder, **changes)))


def backbone_of(kind: str, dtype: str = "float32") -> Backbone:
    place = {"model_name_or_path": str(BACKBONES[kind]()), "dtype": dtype}
    options = BackboneOptions.model_validate(place)
    return load_backbone(options, CPU, task=Task("sequence_classification", LABELS))


def batch_of(backbone: Backbone, rows: list[dict[str, str]]) -> dict[str, Any]:
    return collate(
        [
            render(backbone.tokenizer, Labelled(row["text"], row["label"]), backbone.task)
            for row in rows
        ],
        backbone.pad_token_id,
    )


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("head", ["shared", "private"])
def test_what_a_run_exports_loads_through_peft_and_says_the_same(
    tmp_path: Path, kind: str, head: str
) -> None:
    from peft import AutoPeftModelForSequenceClassification

    place = {"backbone.model_name_or_path": str(BACKBONES[kind]()), "adapter.head": head}
    result = run(tmp_path, **place)
    assert (result.folder / "global").is_dir() == (head == "shared")
    index = json.loads((result.folder / "adapters.json").read_text())
    assert index["run"]["task"] == "sequence_classification"
    assert index["run"]["labels"] == list(LABELS)

    rows = [row for row in labelled_rows() if row["split"] == "test"]
    changed = 0
    for client in result.clients:
        folder = result.folder / "adapters" / client.slug
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["task_type"] == "SEQ_CLS"
        model = AutoPeftModelForSequenceClassification.from_pretrained(
            str(folder), id2label=dict(enumerate(index["run"]["labels"])), pad_token_id=0
        ).eval()
        assert model.config.id2label == dict(enumerate(LABELS))
        own = [row for row in rows if row["client"] == client.client]
        backbone = backbone_of(kind)
        model.config.pad_token_id = backbone.pad_token_id
        loss = nll_by_row(model, batch_of(backbone, own)).mean()
        chosen = client.scores["test"][client.choice.candidate]
        assert float(loss.detach()) == pytest.approx(chosen, abs=1e-5)
        changed += client.choice.candidate != "base"
    assert changed


def test_the_untouched_backbone_says_of_each_class_the_same(tmp_path: Path) -> None:
    """A loss of ln C, whatever the precision of the backbone; and it guesses the first class."""
    for dtype in ("float32", "bfloat16"):
        result = run(tmp_path / dtype, **{"backbone.dtype": dtype})
        found = [c.scores[split]["base"] for c in result.clients for split in c.scores]
        assert found == [pytest.approx(math.log(3), abs=1e-6)] * 6
        last = [row for row in scored(result.folder) if row["round"] == "2"]
        assert {row["metric"] for row in last} == {"nll", "accuracy", "macro_f1"}
        alice = [row for row in labelled_rows() if row["client"] == "alice"]
        share = sum(r["label"] == "fruit" for r in alice if r["split"] == "test") / 3
        [base] = [
            float(row["value"])
            for row in last
            if (row["client"], row["split"], row["candidate"], row["metric"])
            == ("alice", "test", "base", "accuracy")
        ]
        assert base == pytest.approx(share)


@pytest.mark.parametrize("kind", BACKBONES)
def test_padding_and_neighbours_change_nothing(kind: str) -> None:
    """An encoder attends both ways, a decoder takes its last token: neither sees what fills up."""
    backbone = backbone_of(kind)
    adapter = Adapter(backbone, AdapterOptions(), seed=1, trunk=TrunkStates())
    generator = torch.Generator().manual_seed(3)
    vector = adapter.read() + 0.3 * torch.randn(adapter.layout.d, generator=generator)
    adapter.write(vector)
    rows = labelled_rows(("alice",))
    together = batch_of(backbone, rows)
    lengths = together["attention_mask"].sum(dim=1)
    assert lengths.min() < lengths.max()
    with torch.no_grad():
        found = guessed(adapter.forward, together)
        alone = torch.cat([nll_by_row(adapter.forward, batch_of(backbone, [row])) for row in rows])
        torch.testing.assert_close(found.nll, alone, rtol=0, atol=2e-6)
        assert torch.equal(found.nll, nll_by_row(adapter.forward, together))
        own = backbone.model(
            input_ids=together["input_ids"],
            attention_mask=together["attention_mask"],
            labels=together["classes"],
        )
        torch.testing.assert_close(found.nll.mean(), own.loss, rtol=0, atol=1e-6)
        assert torch.equal(found.classes, own.logits.argmax(dim=-1))
        assert torch.equal(mean_nll_by_row(adapter.forward, together), found.nll)
        assert len(found.nll.unique()) > 3


def test_nothing_is_remembered_below_the_adapter_of_a_classifier() -> None:
    """Its frozen layers drop states out while it trains, so they are no constant of the row."""
    backbone = backbone_of("bert")
    options = AdapterOptions(layers_to_transform=[1])
    adapter = Adapter(backbone, options, seed=1, trunk=TrunkStates())
    assert adapter.forward is backbone.model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_an_adapter_with_a_head_is_one_vector(kind: str, dtype: str) -> None:
    backbone = backbone_of(kind, dtype)
    names_before = [name for name, _ in backbone.model.named_parameters()]
    adapter = Adapter(backbone, AdapterOptions(), seed=1)
    layout, start = adapter.layout, adapter.read()
    names = [entry.module for entry in layout.entries if entry.head]
    wanted = {
        "bert": ["classifier.weight", "classifier.bias"],
        "roberta": [
            f"classifier.{n}.{p}" for n in ("dense", "out_proj") for p in ("weight", "bias")
        ],
        "llama": ["score.weight"],
    }
    assert names == wanted[kind]
    assert layout.head.stop == layout.d
    assert not layout.without_effect(start)[layout.head].any()
    assert start[layout.head].any() == (kind == "roberta")  # its last layer alone is zero

    nll_sum(adapter.forward, batch_of(backbone, labelled_rows(("alice",)))).backward()
    assert adapter.grads[layout.head].any()
    assert all(each.grad.data_ptr() for each in adapter.parameters())
    assert torch.equal(adapter.vector(adapter.tensors(start)), start)

    adapter.close()
    again = Adapter(backbone, AdapterOptions(), seed=1)
    assert torch.equal(again.read(), start)
    again.close()
    assert not any(each.requires_grad for each in backbone.model.parameters())
    assert [name for name, _ in backbone.model.named_parameters()] == names_before


def test_equal_loads_have_equal_fingerprints() -> None:
    """The head that transformers draws at random is no part of it."""
    torch.manual_seed(1)
    one = backbone_of("roberta").fingerprint
    torch.manual_seed(2)
    assert backbone_of("roberta").fingerprint == one


def test_one_client_is_plain_training(tmp_path: Path) -> None:
    """FedAvg with one client and a shared head against transformers, PEFT and a stock AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = str(tiny_encoder(dropout=0.0))
    rows = labelled_rows(("alice",))
    path = write_jsonl(tmp_path / "alice.jsonl", rows)
    result = run(
        tmp_path,
        **{
            "backbone.model_name_or_path": place,
            "data.path": str(path),
            "data.labels": list(LABELS),
            "federation.rounds": 1,
            "training.max_steps": 7,
        },
    )
    [alice] = result.clients
    assert alice.choice.candidate == "global"

    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=3)
    torch.manual_seed(derive_seed(7, "adapter"))
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = get_peft_model(model, config).eval()
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    with torch.no_grad():
        for name, each in trained.items():
            if "classifier" in name:
                each.zero_()
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02, weight_decay=0.0)
    examples = _train_examples(result, tokenizer, rows)
    turn = derive_seed(7, "turn", "alice", 1)
    for batch in training_batches(
        examples, steps=7, accumulation=1, batch_size=2, pad_token_id=0, seed=turn
    ):
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["classes"],
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    saved = load_file(result.folder / "adapters" / "alice" / "adapter_model.safetensors")
    by_hand = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): each
        for name, each in trained.items()
    }
    assert saved.keys() == by_hand.keys()
    assert saved["base_model.model.classifier.weight"].any()
    for name, each in saved.items():
        torch.testing.assert_close(each, by_hand[name].detach(), rtol=0, atol=2e-6)


def _train_examples(result: RunResult, tokenizer: Any, rows: list[dict[str, str]]) -> Any:
    from pfl_lm.data.population import read_population
    from pfl_lm.recipe.data import DataOptions

    options = DataOptions.model_validate(
        {
            "path": str(result.folder.parents[1] / "alice.jsonl"),
            "format": "text_label",
            "split_column": "split",
        }
    )
    train = read_population(options).clients["alice"].train
    task = Task("sequence_classification", LABELS)
    assert len(train) < len(rows)
    return [render(tokenizer, record.content, task) for record in train]


@pytest.mark.parametrize("make", [word_tokenizer, lambda: word_tokenizer("$A")])
def test_a_long_text_is_cut_as_transformers_cuts_it(make: Callable[[], Any]) -> None:
    tokenizer = make()
    text = "a violin and a cello and a harp, and stones"
    task = Task("sequence_classification", LABELS)
    whole = render(tokenizer, Labelled(text, "music"), task)
    assert list(whole.input_ids) == tokenizer(text)["input_ids"]
    assert whole.n_supervised == 1
    for n in range(8, len(whole.input_ids) + 2):
        cut = tokenizer(text, truncation=True, max_length=n)["input_ids"]
        assert list(whole.cut(n).input_ids) == cut
        assert whole.cut(n).label == 1


def test_a_loss_is_a_sum_over_rows_of_known_numbers() -> None:
    """By hand: zero logits but for one class that gains 1, of two rows, one of that class."""

    class Model(torch.nn.Module):
        def forward(self, **given: Any) -> Any:
            logits = torch.zeros(2, 3)
            logits[:, 1] = 1.0
            return type("Out", (), {"logits": logits})

    batch = {
        "input_ids": torch.ones(2, 4, dtype=torch.int64),
        "attention_mask": torch.ones(2, 4, dtype=torch.int64),
        "classes": torch.tensor([1, 2]),
    }
    total = math.log(2 + math.e)
    assert float(nll_sum(Model(), batch)) == pytest.approx(2 * total - 1)
    found = guessed(Model(), batch)
    assert found.nll.tolist() == pytest.approx([total - 1, total])
    assert found.right.tolist() == [1.0, 0.0]
    assert F.softmax(torch.tensor([0.0, 1.0, 0.0]), 0)[1] == pytest.approx(math.e / (2 + math.e))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_rows_own_gradient_is_that_of_the_row_alone(kind: str) -> None:
    """Of the adapter and of the head, so that record-level privacy covers both."""
    from pfl_lm.privacy.examples import take_rows, watched_rows

    place = {"bert": tiny_encoder(dropout=0.0), "llama": tiny_decoder()}[kind]
    options = BackboneOptions.model_validate({"model_name_or_path": str(place), "dtype": "float32"})
    backbone = load_backbone(options, CPU, task=Task("sequence_classification", LABELS))
    adapter = Adapter(backbone, AdapterOptions(), seed=1)
    adapter.model.train()  # as Opacus wants it; nothing is dropped out in these two
    generator = torch.Generator().manual_seed(3)
    adapter.write(adapter.read() + 0.3 * torch.randn(adapter.layout.d, generator=generator))
    rows = labelled_rows(("alice",))[:4]
    batch = batch_of(backbone, rows)
    found = torch.zeros(4, adapter.layout.d)
    adapter.zero_grad()
    with watched_rows(adapter):
        torch.autograd.backward(mean_nll_by_row(adapter.model, batch).sum())
        for entry, gradient in take_rows(adapter, 4):
            found[:, entry.start : entry.stop] = gradient.flatten(1)
    torch.testing.assert_close(found.sum(dim=0), adapter.grads, rtol=1e-4, atol=1e-6)
    for row, gradient in zip(rows, found, strict=True):
        adapter.zero_grad()
        nll_sum(adapter.forward, batch_of(backbone, [row])).backward()
        torch.testing.assert_close(gradient, adapter.grads, rtol=1e-3, atol=1e-5)
        assert gradient[adapter.layout.head].any()
    adapter.close()


@pytest.mark.parametrize("head", ["shared", "private"])
def test_a_private_run_is_accounted_for(tmp_path: Path, head: str) -> None:
    lever = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-2}
    result = run(tmp_path, **{"privacy.record_level": lever, "adapter.head": head})
    assert all(client.spent.record_level is not None for client in result.clients)


def test_what_the_verbs_say_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pfl_lm.cli.plan import plan
    from pfl_lm.cli.preview import preview
    from pfl_lm.cli.validate import validate

    path = classification(tmp_path)
    validate(path, [])
    preview(path, [])
    plan(path, [])
    said = capsys.readouterr().out
    assert "  data        text_label, as task says, from 1 file of JSON Lines\n" in said
    assert "  labels      3: 'fruit', 'music', 'stone'\n" in said
    assert "[SEP]" in said
    assert "│ ⟦fruit⟧" in said
    assert "no estimate of memory" not in said

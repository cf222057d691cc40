"""An encoder with a decoder: the one reads what is asked, the other writes the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pfl_lm.data.batches import collate
from pfl_lm.data.content import PromptCompletion
from pfl_lm.data.examples import Example
from pfl_lm.data.render import render
from pfl_lm.evaluate.answers import Answers
from pfl_lm.finetune import RunResult, finetune
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import Backbone, load_backbone
from pfl_lm.recipe import AdapterOptions, BackboneOptions, EvaluationOptions, Task, load_recipe
from pfl_lm.train.loss import error_by_row, guessed, mean_nll_by_row, nll_by_row, nll_sum
from tests.runs import scored
from tests.tasks.worlds import tiny_t5
from tests.tiny import client_rows, tiny_recipe

TASK = Task("seq2seq_lm")


def backbone() -> Backbone:
    place = {"model_name_or_path": str(tiny_t5()), "dtype": "float32"}
    return load_backbone(BackboneOptions.model_validate(place), torch.device("cpu"), task=TASK)


def examples(tokenizer: Any) -> list[Example]:
    contents = [PromptCompletion(row["prompt"], row["completion"]) for row in client_rows()[3:8]]
    contents.append(PromptCompletion("plum", "pear"))
    return [render(tokenizer, content, TASK) for content in contents]


def run(folder: Path, **changes: Any) -> RunResult:
    ours: dict[str, Any] = {
        "task": "seq2seq_lm",
        "backbone.model_name_or_path": str(tiny_t5()),
        "method.name": "fedavg",
        "training.optimizer": "adamw",
        "training.learning_rate": 0.01,
    }
    return finetune(load_recipe(tiny_recipe(folder, **{**ours, **changes})))


def test_a_pair_in_tokens() -> None:
    tokenizer = backbone().tokenizer
    pair = render(tokenizer, PromptCompletion("a plum?", "a pear."), TASK)
    assert tokenizer.decode(pair.input_ids) == "a plum ? [SEP]"
    assert tokenizer.decode(pair.target) == "a pear . [SEP]"
    assert pair.n_supervised == len(pair.target)
    cut = render(tokenizer, PromptCompletion("plum pear " * 9, "cherry quince " * 9), TASK).cut(8)
    assert len(cut.input_ids) == len(cut.target) == 8
    assert cut.input_ids[-1] == cut.target[-1] == tokenizer.eos_token_id


def test_losses_are_those_of_transformers() -> None:
    """Summed over supervised tokens, whatever fills up either side."""
    loaded = backbone()
    adapter = Adapter(loaded, AdapterOptions(), seed=1)
    generator = torch.Generator().manual_seed(3)
    adapter.write(adapter.read() + 0.3 * torch.randn(adapter.layout.d, generator=generator))
    rows = examples(loaded.tokenizer)
    batch = collate(rows, loaded.pad_token_id)
    assert (batch["targets"] == -100).any()
    with torch.no_grad():
        out = loaded.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["targets"],
        )
        n = sum(row.n_supervised for row in rows)
        nll = nll_by_row(adapter.forward, batch)
        torch.testing.assert_close(nll_sum(adapter.forward, batch) / n, out.loss)
        alone = [nll_by_row(adapter.forward, collate([row], 0)) for row in rows]
        torch.testing.assert_close(nll, torch.cat(alone), rtol=0, atol=1e-4)
        found = guessed(adapter.forward, batch)
        assert torch.equal(found.nll, nll)
        right = (out.logits.argmax(-1) == batch["targets"]).sum(1)
        assert torch.equal(found.right, right.float())
        tokens = torch.tensor([row.n_supervised for row in rows])
        torch.testing.assert_close(mean_nll_by_row(adapter.forward, batch), nll / tokens)
        error = error_by_row(adapter.forward, batch)
        torch.testing.assert_close(error, 1 - found.right / tokens)


def test_a_run_ends_in_adapters_that_peft_loads(tmp_path: Path) -> None:
    from peft import AutoPeftModelForSeq2SeqLM

    result = run(tmp_path)
    tokenizer = backbone().tokenizer
    for client in result.clients:
        folder = result.folder / "adapters" / client.slug
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["task_type"] == "SEQ_2_SEQ_LM"
        assert config["target_modules"] == ["q", "v"]
        model = AutoPeftModelForSeq2SeqLM.from_pretrained(str(folder)).eval()
        contents = [
            PromptCompletion(row["prompt"], row["completion"])
            for row in client_rows((client.client,))
            if row["split"] == "test"
        ]
        rows = [render(tokenizer, content, TASK).cut(128) for content in contents]
        batch = collate(rows, 0)
        with torch.no_grad():
            loss = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=batch["targets"],
            ).loss
        chosen = client.scores["test"][client.choice.candidate]
        assert float(loss) == pytest.approx(chosen, abs=1e-5)
    base = [row for row in scored(result.folder) if row["candidate"] == "base"]
    assert {row["metric"] for row in base} == {"nll", "perplexity", "token_accuracy"}
    assert any(client.choice.candidate != "base" for client in result.clients)


def test_answers_are_the_decoders(tmp_path: Path) -> None:
    """What it finds likeliest after its start token, as a loop without a cache finds it."""
    loaded = backbone()
    adapter = Adapter(loaded, AdapterOptions(), seed=1)
    generator = torch.Generator().manual_seed(3)
    vector = adapter.read() + 0.5 * torch.randn(adapter.layout.d, generator=generator)
    answers = Answers(loaded.tokenizer, EvaluationOptions(max_new_tokens=6))
    for example in examples(loaded.tokenizer)[:3]:
        adapter.write(vector)
        adapter.model.eval()
        asked, ids = torch.tensor([example.input_ids]), [0]
        with torch.no_grad():
            for _ in range(6):
                out = loaded.model(input_ids=asked, decoder_input_ids=torch.tensor([ids]))
                ids.append(int(out.logits[0, -1].argmax()))
                if ids[-1] == loaded.tokenizer.eos_token_id:
                    break
        text = loaded.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answers._written(adapter, example) == text

    changes = {"evaluation.metrics": ["rouge_l"], "evaluation.max_new_tokens": 3}
    result = run(tmp_path, **changes)
    for client in result.clients:
        assert "rouge_l" in client.metrics["test"][client.choice.candidate]
        assert "rouge_l" in client.metrics["validation"]["base"]

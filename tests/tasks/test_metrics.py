"""Every metric against a sum on paper and, where there is one, against an independent reference."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pfl_lm.data.batches import collate
from pfl_lm.evaluate import RowScores
from pfl_lm.evaluate.answers import Answers, exact_match, rouge_l
from pfl_lm.evaluate.metrics import accuracy, macro_f1, metrics_of, perplexity
from pfl_lm.finetune import finetune
from pfl_lm.model.head import MOST_LOGITS
from pfl_lm.recipe import EvaluationOptions, load_recipe
from pfl_lm.train.loss import error_by_row, guessed, nll_by_row
from tests.runs import environment, scored
from tests.tasks.worlds import classification
from tests.tiny import tiny_recipe
from tests.world import make_world


def test_by_hand() -> None:
    # Two rows: 3 nats over 2 tokens, 1 nat over 2; e^(4/4). Of 4 tokens, 1 + 2 are right.
    scores = RowScores(nll=(3.0, 1.0), tokens=(2, 2), right=(1, 2))
    found = metrics_of(scores)
    assert found == {"perplexity": pytest.approx(math.e), "token_accuracy": 0.75}
    assert perplexity([800.0], [1]) == math.inf

    # Classes 0 0 1 2, guessed 0 1 1 0: class 0 has TP 1, FP 1, FN 1: F1 1/2; class 1 has TP 1,
    # FP 1: 2/3; class 2 is never guessed: 0. Two of four are right.
    scores = RowScores((1.0,) * 4, (1,) * 4, (1, 0, 1, 0), classes=(0, 1, 1, 0))
    found = metrics_of(scores, [0, 0, 1, 2])
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx((1 / 2 + 2 / 3 + 0) / 3)}
    assert macro_f1([1, 1], [0, 0]) == 0.0  # a class that is guessed and not there counts
    assert accuracy(["a"], ["a"]) == macro_f1(["a"], ["a"]) == 1.0
    with pytest.raises(ValueError, match="0 guesses for 0 rows"):
        accuracy([], [])

    assert exact_match([" A fruit.", "a fruit."], ["A fruit.", "A fruit."]) == 0.5
    # "the cat sat" in "the dog sat down": the longest common subsequence is "the sat", 2 words;
    # precision 2/3, recall 2/4, F1 4/7.
    assert rouge_l(["The cat sat"], ["the dog sat down!"]) == pytest.approx(4 / 7)
    assert rouge_l(["", "à Paris"], ["something", "À paris."]) == 0.5


def test_against_torchmetrics() -> None:
    from torchmetrics.classification import MulticlassF1Score
    from torchmetrics.functional.text.rouge import rouge_score

    draw = random.Random(4)
    for _ in range(20):
        wanted = [draw.randrange(4) for _ in range(30)]
        guesses = [draw.choice([due, draw.randrange(4)]) for due in wanted]
        reference = MulticlassF1Score(num_classes=4, average="macro")
        theirs = float(reference(torch.tensor(guesses), torch.tensor(wanted)))
        assert macro_f1(guesses, wanted) == pytest.approx(theirs, abs=1e-6)
        texts = [
            " ".join(draw.choice(("a", "b", "c", "dd", "e1")) for _ in range(draw.randint(1, 12)))
            for _ in range(2)
        ]
        theirs = float(rouge_score(*texts, rouge_keys="rougeL")["rougeL_fmeasure"])
        assert rouge_l(texts[:1], texts[1:]) == pytest.approx(theirs, abs=1e-6)


def test_as_metrics_of_evaluate() -> None:
    from pfl_lm.evaluate.hugging_face import METRICS

    given: dict[str, dict[str, Any]] = {
        "perplexity": {"nll": [3.0, 1.0], "tokens": [2, 2]},
        "token_accuracy": {"right": [1, 2], "tokens": [2, 2]},
        "accuracy": {"predictions": [0, 1, 1, 0], "references": [0, 0, 1, 2]},
        "macro_f1": {"predictions": [0, 1, 1, 0], "references": [0, 0, 1, 2]},
        "exact_match": {"predictions": ["a", "b"], "references": ["a", "c"]},
        "rouge_l": {"predictions": ["The cat sat"], "references": ["the dog sat down!"]},
    }
    wanted = [math.e, 0.75, 0.5, 7 / 18, 0.5, 4 / 7]
    assert METRICS.keys() == given.keys()
    for (name, kind), value in zip(METRICS.items(), wanted, strict=True):
        metric = kind(keep_in_memory=True)
        assert metric.compute(**given[name]) == {name: pytest.approx(value)}


@pytest.mark.parametrize("most", [MOST_LOGITS, 100])
def test_what_is_guessed_comes_from_the_same_pass(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """And leaves the losses as they are, to the bit; in parts too."""
    monkeypatch.setattr("pfl_lm.model.head.MOST_LOGITS", most)
    world = make_world()
    world.adapter.write(world.vector())
    batch = collate(world.examples(), world.backbone.pad_token_id)
    found = guessed(world.adapter.forward, batch)
    with torch.no_grad():
        assert torch.equal(found.nll, nll_by_row(world.adapter.forward, batch))
        tokens = torch.tensor([each.n_supervised for each in world.examples()])
        error = error_by_row(world.adapter.forward, batch)
        torch.testing.assert_close(1 - found.right / tokens, error)
        logits = world.backbone.model(batch["input_ids"], batch["attention_mask"]).logits
    shifted = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]).sum(1)
    assert torch.equal(found.right, shifted.float())
    assert found.right.any()


def final(folder: Path) -> dict[tuple[str, ...], float]:
    rows = [row for row in scored(folder) if row["round"] == "2"]
    return {
        (row["client"], row["split"], row["candidate"], row["metric"]): float(row["value"])
        for row in rows
    }


def test_final_scores_of_a_language_model(tmp_path: Path) -> None:
    result = finetune(load_recipe(tiny_recipe(tmp_path)))
    found = final(result.folder)
    assert {key[3] for key in found} == {"nll", "perplexity", "token_accuracy"}
    for (*at, metric), value in found.items():
        if metric == "perplexity":
            assert value == pytest.approx(math.exp(found[(*at, "nll")]))
    before = [row for row in scored(result.folder) if row["round"] != "2"]
    assert {row["metric"] for row in before} == {"nll"}


def test_a_run_without_them_never_imports_evaluate(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pfl_lm.finetune import finetune\n"
        "from pfl_lm.recipe import load_recipe\n"
        f"finetune(load_recipe(Path({str(recipe)!r})))\n"
        "assert 'evaluate' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_answers_are_written_greedily_and_end() -> None:
    """What the model finds likeliest, token by token, as a loop without a cache finds it."""
    world = make_world()
    vector = world.vector(scale=0.3)
    model, tokenizer = world.backbone.model, world.backbone.tokenizer
    answers = Answers(tokenizer, EvaluationOptions(metrics=["rouge_l"], max_new_tokens=9))
    for example in world.examples()[:3]:
        prompt = list(example.input_ids[: example.spans[-1][0]])
        world.adapter.write(vector)
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(9):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[len(prompt) :]
        assert tokenizer.eos_token_id not in new
        assert answers._written(world.adapter, example) == tokenizer.decode(new).strip()

        stop = next(token for token in new if token != new[0])  # as if it ended a text
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.generation_config, "eos_token_id", stop)
            ended = new[: new.index(stop) + 1]
            assert answers._written(world.adapter, example) == tokenizer.decode(ended).strip()

    [wanted] = world.examples()[:1]
    text = tokenizer.decode(wanted.input_ids[wanted.spans[0][0] : wanted.spans[0][1] - 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answers, "_written", lambda self, adapter, example: f" {text}\n")
        found = answers.metrics(world.adapter, vector, [wanted])
    assert found == {"rouge_l": 1.0}


def test_a_run_that_asks_has_them_of_the_chosen_model_and_the_backbone(tmp_path: Path) -> None:
    asked = {"evaluation.metrics": ["exact_match", "rouge_l"], "evaluation.max_new_tokens": 3}
    result = finetune(load_recipe(tiny_recipe(tmp_path, **asked)))
    found = final(result.folder)
    for client in result.clients:
        for name in client.scores["test"]:
            due = name in ("base", client.choice.candidate)
            for metric in asked["evaluation.metrics"]:
                for split in ("test", "validation"):
                    assert ((client.client, split, name, metric) in found) == due
    loss = finetune(load_recipe(tiny_recipe(tmp_path, name="without"))).clients
    assert [c.sha256 for c in loss] == [c.sha256 for c in result.clients]


def test_the_closing_table_says_how_many_rows_are_told(tmp_path: Path) -> None:
    from rich.console import Console

    from pfl_lm.report.table import client_table

    result = finetune(load_recipe(classification(tmp_path)))
    console = Console(width=160, record=True, file=(tmp_path / "out").open("w"))
    console.print(client_table(result.clients))
    text = console.export_text()
    assert "test loss, nats a row (lower is better); accuracy on test rows" in text
    found = final(result.folder)
    for client in result.clients:
        base, own = (
            found[client.client, "test", name, "accuracy"]
            for name in ("base", client.choice.candidate)
        )
        [line] = [line for line in text.splitlines() if line.startswith(f" {client.client}")]
        assert f"{base:.3f} → {own:.3f}" in line

"""What does not go with a task, by the words of each refusal; and where labels come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pfl_lm.errors import DataError, ModelError, PflError, RecipeError
from pfl_lm.federation.watch import Watch
from pfl_lm.finetune import finetune
from pfl_lm.membership import join
from pfl_lm.preflight import check_recipe
from pfl_lm.recipe import load_recipe
from pfl_lm.resume import run_recipe
from tests.tasks.worlds import classification, labelled_rows, tiny_encoder
from tests.tiny import tiny_recipe, write_jsonl

CLASSES = {"task": "sequence_classification"}
PAIRS = {"task": "seq2seq_lm"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"adapter.head": "private"},
            "adapter.head: is for `task: sequence_classification`, where the head is new; with "
            "`task: causal_lm` the model's own stays frozen; leave it out",
        ),
        (
            PAIRS | {"adapter.head": "shared"},
            "adapter.head: is for `task: sequence_classification`, where the head is new; with "
            "`task: seq2seq_lm` the model's own stays frozen; leave it out",
        ),
        (
            {"data.labels": ["a", "b"]},
            "data.labels: is for `task: sequence_classification`; with `task: causal_lm` leave it "
            "out",
        ),
        (
            {"data.format": "text_label"},
            "data.format: is for `task: sequence_classification`; with `task: causal_lm` there are "
            "no labels",
        ),
        (
            CLASSES | {"data.format": "messages"},
            "data.format: a row of `task: sequence_classification` is a text and its label; write "
            "`text_label`, or leave it out",
        ),
        (
            CLASSES | {"evaluation.metrics": ["rouge_l"]},
            "evaluation.metrics: `rouge_l` is of answers that a model writes, and a classifier "
            "writes none; accuracy and macro-F1 are measured in any case",
        ),
        (
            {"data.format": "text", "evaluation.metrics": ["exact_match"]},
            "evaluation.metrics: `exact_match` compares an answer with the one in the row, and a "
            "plain text has no answer in it",
        ),
        (
            {"evaluation.metrics": ["rouge_l", "rouge_l"]},
            "evaluation.metrics: each metric may be named once only",
        ),
        (
            PAIRS | {"data.format": "text"},
            "data.format: `task: seq2seq_lm` answers one text with another; write "
            "`prompt_completion` or `alpaca`, or leave it out",
        ),
        (
            PAIRS | {"backbone.package": "p", "backbone.gguf_file": "a.gguf"},
            "backbone.gguf_file: a GGUF file is read as a causal language model; for `task: "
            "seq2seq_lm` name a folder or a Hub id",
        ),
        (
            PAIRS | {"runtime.compile": True},
            "runtime.compile: compiles the one list of layers that a model has, and an encoder "
            "with a decoder has two; leave it out",
        ),
        (
            PAIRS
            | {
                "privacy.record_level": {
                    "noise_multiplier": 1.0,
                    "max_grad_norm": 1.0,
                    "delta": 1e-5,
                }
            },
            "privacy.record_level: a row's own gradient has not been tried through an encoder and "
            "a decoder; leave it out, or choose another task",
        ),
        (
            CLASSES | {"backbone.quantization": "nf4"},
            "backbone.quantization: has not been tried with `task: sequence_classification`; "
            "leave it out",
        ),
        (
            PAIRS | {"backbone.device_map": "auto"},
            "backbone.device_map: has not been tried with `task: seq2seq_lm`; leave it out",
        ),
        (
            PAIRS | {"training.gradient_checkpointing": True},
            "training.gradient_checkpointing: has not been tried with `task: seq2seq_lm`",
        ),
        (
            CLASSES | {"runtime.parallel": "data"},
            "runtime.parallel: has not been tried with `task: sequence_classification`",
        ),
        (
            CLASSES | {"method.name": "local", "clients": [{"match": {"ids": ["alice"]}, "r": 2}]},
            "clients: `r` and `target_modules` of some clients' own have no place for the head of "
            "`task: sequence_classification`; leave them out",
        ),
        (
            CLASSES | {"method.name": "hetlora"},
            "method.name: `hetlora` averages products B A, and the head of `task: "
            "sequence_classification` is none; choose another method",
        ),
        (CLASSES | {"data.labels": ["a"]}, "data.labels: must name at least two classes"),
        (CLASSES | {"data.labels": ["a", "b", "a"]}, "data.labels: 'a' is there twice"),
        (CLASSES | {"data.labels": ["a", " "]}, "data.labels: ' ' is empty"),
        (
            CLASSES | {"data.labels": ["a", "b" * 201]},
            f"'{'b' * 30}",
        ),
        ({"task": "classification"}, "task: must be one of causal_lm, sequence_classification, "),
        (
            {"backbone.package": "p", "backbone.folder": "m", "backbone.gguf_file": "a.gguf"},
            "backbone.gguf_file: `backbone.package` needs one of `gguf_file` and `folder`; both "
            "are given",
        ),
        (
            {"backbone.package": "p", "backbone.folder": "../m"},
            "backbone.folder: must be the name of a folder inside the package, got '../m'",
        ),
        (
            {"backbone.model_name_or_path": "a/b", "backbone.folder": "m"},
            "backbone.folder: goes with `package` only, not with `model_name_or_path`",
        ),
    ],
)
def test_what_a_recipe_cannot_ask_of_a_task(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(tiny_recipe(tmp_path, **changes))
    assert said in str(caught.value)


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        check_recipe(path)
    return caught.value


def with_rows(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    return classification(
        folder, **{"data.path": str(write_jsonl(folder / "own.jsonl", rows))}, **changes
    )


def test_a_label_that_no_train_row_has_is_refused(tmp_path: Path) -> None:
    """By its line, its client and its split; nothing is guessed, and no row is left out."""
    rows = labelled_rows()
    rows[10]["label"] = "musik"
    error = refused(with_rows(tmp_path, rows))
    assert error.message.splitlines()[1].strip() == (
        "line 11: client 'alice', test: the label 'musik' is not among those of the train rows: "
        "'fruit', 'music', 'stone'. Did you mean 'music'?"
    )
    assert error.hint == "list every class in data.labels; what is not in the list is refused"

    error = refused(with_rows(tmp_path, labelled_rows(), **{"data.labels": ["fruit", "music"]}))
    assert "the label 'stone' is not among data.labels: 'fruit', 'music'" in error.message
    listed = {"data.labels": ["stone", "musik", "music", "fruit"]}
    checked = check_recipe(with_rows(tmp_path, rows, **listed))
    assert checked.loaded.recipe.task_for().labels == ("stone", "musik", "music", "fruit")


def test_too_few_and_too_many_labels(tmp_path: Path) -> None:
    one = [{**row, "label": "fruit"} for row in labelled_rows()]
    assert "tells 2 to 1000 labels apart, and the train rows have only 'fruit'" in str(
        refused(with_rows(tmp_path, one))
    )
    many = [{"client": "a", "text": f"row {i}", "label": i, "split": "train"} for i in range(1200)]
    assert "different ones" in str(refused(with_rows(tmp_path, many)))


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (None, "'label' must be a string or a whole number, got null"),
        (1.5, "'label' must be a string or a whole number, got the number 1.5"),
        (" ", "'label' is empty. Each row names its label"),
        ("x" * 201, "'label' is longer than 200 characters, for the name of a class"),
    ],
)
def test_what_is_no_label(tmp_path: Path, label: object, said: str) -> None:
    rows: list[dict[str, Any]] = [*labelled_rows()]
    rows[0] = {**rows[0], "label": label}
    assert f"line 1: {said}" in str(refused(with_rows(tmp_path, rows)))


def test_rows_without_labels(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "label"} for row in labelled_rows()]
    error = refused(with_rows(tmp_path, rows))
    assert "no row has the column 'label'. Columns there: 'client', 'text', 'split'" in str(error)
    assert error.hint is not None
    assert error.hint.endswith("with the client column, `text` and `label`")


def test_numbers_are_labels_in_the_order_of_numbers(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**row, "label": {"fruit": 10, "stone": 9, "music": 2}[row["label"]]}
        for row in labelled_rows()
    ]
    result = finetune(load_recipe(with_rows(tmp_path, rows)))
    assert run_recipe(result.folder).recipe.task_for().labels == ("2", "9", "10")


def test_rows_of_another_format_than_the_task(tmp_path: Path) -> None:
    texts = [{"client": c, "text": f"Text {i} of {c}."} for c in "ab" for i in range(8)]
    path = str(write_jsonl(tmp_path / "texts.jsonl", texts))
    changes = {"data.path": path, "data.split_column": None}
    error = refused(tiny_recipe(tmp_path, **PAIRS, **changes))
    assert "of the format text, which is not one text and the text that answers it" in str(error)
    asked = {"evaluation.metrics": ["exact_match"]}
    error = refused(tiny_recipe(tmp_path, **asked, **changes))
    assert "and rows of the format text have none" in str(error)


def test_a_backbone_that_is_no_model_of_the_task(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **PAIRS)  # a decoder alone
    with pytest.raises(ModelError, match="cannot be loaded: Unrecognized configuration class"):
        finetune(load_recipe(recipe))


def test_weights_that_lack_part_of_the_trunk(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "half"
    folder.mkdir()
    for path in tiny_encoder().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights = {name: each for name, each in weights.items() if "pooler" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = classification(tmp_path, **{"backbone.model_name_or_path": str(folder)})
    with pytest.raises(ModelError, match=r"lack parts of the model below the head: 'bert\.pooler"):
        finetune(load_recipe(recipe))


def test_what_a_run_has_found_is_what_it_goes_on_with(tmp_path: Path) -> None:
    """Labels are settled when a run begins; who joins later has no others."""
    rows = labelled_rows(("alice", "bob"))
    result = finetune(load_recipe(with_rows(tmp_path, rows)))
    assert run_recipe(result.folder).recipe.data.labels == ["fruit", "music", "stone"]

    new = [{**row, "label": "bird"} for row in labelled_rows(("carol",))]
    path = write_jsonl(tmp_path / "carol.jsonl", new)
    with pytest.raises(PflError, match="the label 'bird' is not among those of this run"):
        join(result.folder, "carol", path)
    path = write_jsonl(tmp_path / "carol.jsonl", labelled_rows(("carol",)))
    assert join(result.folder, "carol", path).client == "carol"
    again = finetune(run_recipe(result.folder, 3), Watch(), resume=True)
    assert [c.client for c in again.clients] == ["alice", "bob", "carol"]


def test_a_column_called_label_is_no_class_of_a_language_model(tmp_path: Path) -> None:
    rows = labelled_rows()
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    checked = check_recipe(tiny_recipe(tmp_path, **{"data.path": path}))
    assert checked.clients["alice"].train[0].format == "text"

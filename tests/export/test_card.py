"""Cards: a golden one, what they must never say, and ids that try to act."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pfl_lm.evaluate import BASE, Choice
from pfl_lm.export import index
from pfl_lm.export.card import client_card, global_card
from pfl_lm.export.card_recipe import HIDDEN, shown_recipe
from pfl_lm.export.card_text import (
    BaseModel,
    Place,
    front_matter,
    hub_id,
    load_section,
    size,
    with_load_section,
)
from pfl_lm.export.index import RowCounts
from pfl_lm.export.repository_card import repository_card
from pfl_lm.recipe.partition import PartitionOptions
from tests.export.card_facts import SCORES, client_facts, metadata, run_facts, two_clients

GOLDEN = Path(__file__).with_name("golden_card.md")


def test_a_clients_card_word_for_word() -> None:
    assert client_card(run_facts(), client_facts()) == GOLDEN.read_text(encoding="utf-8")


def test_front_matter_as_the_hub_reads_it() -> None:
    assert metadata(client_card(run_facts(), client_facts())) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [
            "lora",
            "transformers",
            "federated-learning",
            "personalization",
            "pfl-lm",
            "base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct",
        ],
    }


@pytest.mark.parametrize("word", ["no", "1e5", "null", "0x10", "~"])
def test_front_matter_keeps_an_odd_id_as_text(word: str) -> None:
    base = BaseModel(hub_id(word), None, "float32")

    found = yaml.safe_load(front_matter(base).strip("-\n"))

    assert found.get("base_model") == (None if word == "~" else word)


@pytest.mark.parametrize(
    "name",
    ["/home/me/model", "./model", "../model", "~/model", "a/b/c", "C:\\model", "", None, "a b"],
)
def test_a_folder_is_no_hub_id(name: str | None) -> None:
    assert hub_id(name) is None


def test_a_base_that_is_a_folder_is_not_named() -> None:
    run = replace(run_facts(), base=BaseModel(None, None, "float32"))

    card = client_card(run, client_facts())

    assert not {"base_model", "base_model_relation"} & metadata(card).keys()
    assert "base = PeftConfig.from_pretrained(adapter).base_model_name_or_path\n" in card
    assert "the personal model" in card
    assert "a base model that is not on the Hub" in card


def test_the_backbone_that_won_is_said_plainly() -> None:
    reason = "no candidate beat the untouched backbone (realigned: +0.0120 ± 0.0031 nats a token)"
    card = client_card(run_facts(), client_facts(choice=Choice(BASE, reason, 0.0, 0.0)))

    assert "**This client keeps the backbone**, because no candidate beat it" in card
    assert "| **base** (chosen) | the untouched backbone | 2.6324 |  |\n" in card
    assert f"Chosen by 6 validation rows: {reason}.\n" in card
    assert "This client keeps the backbone" not in client_card(run_facts(), client_facts())


def test_a_choice_within_one_standard_error_is_called_chance() -> None:
    near = Choice("realigned", "the method's own model, realigned", -0.0021, 0.0031)

    card = client_card(run_facts(), client_facts(choice=near))

    assert "-0.0021 nats a token (± 0.0031, one paired standard error: it may be chance)" in card


def test_one_validation_row_has_no_standard_error() -> None:
    alone = Choice("realigned", "the method's own model, realigned", -0.0021, float("inf"))

    card = client_card(run_facts(), client_facts(choice=alone, rows=RowCounts(**ONE_OF_EACH)))

    assert "Chosen by 1 validation row: the method's own" in card
    assert "(one row alone says nothing of the error)" in card
    assert "own 1 test row (read once" in card
    assert "inf" not in card.replace("info", "")


ONE_OF_EACH = {"train": 1, "validation": 1, "test": 1}


def test_without_test_rows_the_validation_scores_are_called_that() -> None:
    scores = {"validation": SCORES["validation"]}
    rows = RowCounts(train=42, validation=6, test=0)

    card = client_card(run_facts(), client_facts(scores=scores, rows=rows))

    assert "own 6 validation rows (those the choice was made on)" in card
    assert "2.5446" in card
    assert "test rows" not in card


def test_a_loss_that_is_not_finite() -> None:
    scores = {"test": SCORES["test"] | {"local": float("inf")}}

    assert "| not finite |" in client_card(run_facts(), client_facts(scores=scores))


def test_a_client_that_uploads_nothing_is_not_warned_of_uploads() -> None:
    warned = "What a client uploads"

    assert warned in client_card(run_facts(), client_facts())
    assert warned not in client_card(run_facts(), client_facts(bytes_up=0))


def test_the_shared_adapters_card() -> None:
    other = {"test": {"base": 3.0, "global": 2.0}, "validation": {"base": 9.0, "global": 9.0}}

    card = global_card(run_facts(), {"en:Arts": SCORES, "alice": other})

    assert metadata(card)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "| base | the untouched backbone | 2.8162 | 3.0000 |\n" in card
    assert "| global | the shared adapter | 2.3144 | 2.6289 |\n" in card
    assert 'adapter = "global"' in card
    assert "alice" not in card
    assert "Arts" not in card


def every_card() -> list[str]:
    run = run_facts()
    folder = replace(run, base=BaseModel(None, None, "float32"))
    kept = client_facts(choice=Choice(BASE, "no candidate beat it", 0.0, 0.0))
    cards = [client_card(r, f) for r in (run, folder) for f in (client_facts(), kept)]
    return [*cards, global_card(run, {"alice": SCORES}), repository_card(two_clients(), "me/x")]


def test_what_no_card_says() -> None:
    for card in every_card():
        for word in ("/home", "someone", "secret", "More Information Needed", "hf_", "licence:"):
            assert word not in card
        assert "license" not in metadata(card)
        assert "Federated is not private" in card
        assert "\x1b" not in card


def test_the_recipe_in_a_card_shows_numbers_and_hides_words() -> None:
    shown = yaml.safe_load(shown_recipe(run_facts().recipe, {"alice"}))

    assert shown["data"] == {
        "path": HIDDEN,
        "package": None,
        "data_file": None,
        "dataset_name": None,
        "dataset_config_name": None,
        "revision": None,
        "dataset_train_split": None,
        "dataset_validation_split": None,
        "dataset_test_split": None,
        "format": "auto",
        "columns": {},
        "labels": None,
        "client_column": HIDDEN,
        "partition": None,
        "split_column": HIDDEN,
        "group_column": None,
        "validation_fraction": 0.125,
        "min_train_samples": None,
        "max_train_samples": None,
        "holdout_clients": 0,
        "max_length": 512,
        "on_long": "truncate",
        "group_by_length": False,
    }
    plain = {"parallel": "auto", "threads": None, "trunk_cache": "auto", "compile": False}
    plain |= {"token_cache": "auto", "tracking": "none"}
    assert shown["runtime"] == {"output_dir": HIDDEN, **plain}
    assert shown["backbone"]["gguf_file"] == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert shown["training"]["optimizer"] == "sgd"


@pytest.mark.parametrize("path", ["/opt/model", "~/model", "../model", "C:\\model", "\\\\host\\m"])
def test_the_recipe_in_a_card_hides_paths_anywhere(path: str) -> None:
    recipe = run_facts(backbone={"model_name_or_path": path}).recipe

    assert yaml.safe_load(shown_recipe(recipe, set()))["backbone"]["model_name_or_path"] == HIDDEN


def test_the_recipe_in_a_card_hides_where_the_trace_is() -> None:
    federation = {"rounds": 3, "availability": "/home/someone/trace.csv", "clients_per_round": 2}
    shown = yaml.safe_load(shown_recipe(run_facts(federation=federation).recipe, set()))
    assert shown["federation"]["availability"] == HIDDEN
    assert shown["federation"]["clients_per_round"] == 2


def test_the_recipe_in_a_card_hides_ids_in_lists_and_keys() -> None:
    recipe = run_facts(adapter={"target_modules": ["q_proj", "alice"]}).recipe
    # A section of a later version that maps or lists clients.
    object.__setattr__(recipe.federation, "rounds", {"alice": 3})

    with pytest.warns(UserWarning, match="serializ"):
        shown = yaml.safe_load(shown_recipe(recipe, {"alice"}))

    assert shown["adapter"]["target_modules"] == ["q_proj", HIDDEN]
    assert shown["federation"]["rounds"] == HIDDEN


def test_the_index_card_of_a_repository() -> None:
    card = repository_card(two_clients(), "me/x")

    assert metadata(card)["base_model"] == "org/base"
    assert "# quick&#95;start: one adapter per client\n" in card
    assert "| alice | [alice](clients/alice) | realigned | 42 | test | 2.6324 | 2.6238 |" in card
    assert "| zoe | [z](clients/z) | base | 42 | validation | 2.0000 | 2.0000 | +0.0000 |\n" in card
    assert 'subfolder="clients/alice"' in card
    assert 'revision="main"' in card


def test_a_revision_that_is_no_revision_is_left_out() -> None:
    base = BaseModel("org/base", "x'); import os #", "float32")

    assert "import os" not in load_section(base, Place("me/x", "clients/a"))


@pytest.mark.parametrize("base", [BaseModel("o/b", None, "float32"), BaseModel(None, None, "x")])
@pytest.mark.parametrize("place", [Place("a", remark="  # x"), Place("o/r", "clients/a")])
def test_the_code_to_load_is_python(base: BaseModel, place: Place) -> None:
    code = load_section(base, place).split("```")[1].removeprefix("python")

    compile(code, "card", "exec")


@pytest.mark.parametrize("place", [Place("a"), Place("o/r", "clients/a")])
def test_what_was_learnt_without_a_chat_template_is_asked_without_one(place: Place) -> None:
    code = load_section(BaseModel("o/b", None, "float32", "text"), place)

    assert "apply_chat_template" not in code
    assert 'prompt = tokenizer("Once upon a time", return_tensors="pt")\n' in code


def test_the_load_section_is_replaced_and_nothing_else() -> None:
    base = BaseModel("o/b", None, "float32")
    here, there = load_section(base, Place("a")), load_section(base, Place("o/r", "clients/a"))
    card = f"before\n{here}after\n"

    assert with_load_section(card, there) == f"before\n{there}after\n"
    for other in ("no marks\n", card + here, card.replace("<!-- /pfl", "<!-- pfl")):
        assert with_load_section(other, there) == other


def test_sizes_as_people_say_them() -> None:
    assert [size(n) for n in (0, 999, 1000, 999_949, 999_950, 2_500_000, 7 * 10**12)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "999.9 kB",
        "1.0 MB",
        "2.5 MB",
        "7000.0 GB",
    ]


def test_the_untouched_backbone_has_one_name() -> None:
    assert index.BASE == BASE


def test_a_card_tells_neither_columns_nor_who_was_kept_for_later() -> None:
    recipe = run_facts().recipe
    partition = PartitionOptions(name="natural_id", partition_by="diagnosis")
    private = {"columns": {"notes": "text"}, "holdout_clients": ["zoe"], "partition": partition}
    data = recipe.data.model_copy(update=private)
    text = shown_recipe(recipe.model_copy(update={"data": data}), {"alice"})
    shown = yaml.safe_load(text)["data"]
    assert {key: shown[key] for key in private} == dict.fromkeys(private, HIDDEN)
    assert not any(word in text for word in ("notes", "zoe", "diagnosis"))

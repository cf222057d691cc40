from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfl_lm.errors import RecipeError
from pfl_lm.recipe import PFLAlignOptions, json_schema, load_recipe
from pfl_lm.recipe.overrides import apply_overrides, parse_overrides
from pfl_lm.recipe.scalars import Value
from pfl_lm.recipe.write import write_yaml
from pfl_lm.recipe.yaml12 import read_yaml
from tests.recipe.minimal import MINIMAL, load, write


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that is not the recipe's."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path).recipe

    assert (recipe.seed, recipe.adapter.r, recipe.adapter.lora_alpha) == (0, 8, 16)
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert (recipe.data.client_column, recipe.data.validation_fraction) == ("client", 0.125)
    assert recipe.training.per_device_train_batch_size == 8
    assert recipe.federation.fraction_train == 1.0
    assert recipe.method == PFLAlignOptions(name="pflalign", beta=0.9, eps=0.0, correction="erf")


@pytest.mark.parametrize(
    ("overrides", "optimizer"),
    [
        ((), "sgd"),
        (("method.precondition_target=update",), "adamw"),
        (("method.name=fedavg",), "adamw"),
        (("method.name=local",), "adamw"),
        (("method.name=fedavg", "training.optimizer=sgd"), "sgd"),
        (("method.precondition_target=update", "training.optimizer=adamw"), "adamw"),
        (("training.optimizer=~",), "sgd"),
    ],
)
def test_the_optimizer_is_chosen_by_the_method(
    tmp_path: Path, overrides: tuple[str, ...], optimizer: str
) -> None:
    loaded = load(tmp_path, *overrides)

    assert loaded.recipe.training.optimizer == optimizer
    assert f"\n  optimizer: {optimizer}\n" in loaded.resolved()


def test_whole_alphas_stay_whole(tmp_path: Path) -> None:
    assert repr(load(tmp_path, "adapter.lora_alpha=32").recipe.adapter.lora_alpha) == "32"
    assert repr(load(tmp_path, "adapter.lora_alpha=32.0").recipe.adapter.lora_alpha) == "32"
    assert repr(load(tmp_path, "adapter.lora_alpha=0.5").recipe.adapter.lora_alpha) == "0.5"


def test_no_personal_start_goes_with_no_correction(tmp_path: Path) -> None:
    method = load(
        tmp_path, "method.personalized_start=false", "method.correction=none"
    ).recipe.method

    assert isinstance(method, PFLAlignOptions)
    assert not method.personalized_start


def test_overrides_win_and_make_the_sections_they_need(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "adapter.target_modules=[k_proj]",
        "training={learning_rate: 1e-3, max_steps: 7}",
        "federation.rounds=0x10",
        "name=yes",
    )

    assert loaded.recipe.adapter.target_modules == ["k_proj"]
    assert loaded.recipe.training.learning_rate == 1e-3
    assert loaded.recipe.federation.rounds == 16
    assert loaded.recipe.name == "yes"
    assert loaded.source_text == MINIMAL


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["seed"], ["override seed: expected key=value"]),
        (["=3"], ["override =3: the key '' is not of the form section.key"]),
        (
            ["adapter..r=3"],
            ["override adapter..r=3: the key 'adapter..r' is not of the form section.key"],
        ),
        (["seed=1", "seed=1"], ["override seed=1: `seed=1` sets the same key already"]),
        (
            ["adapter={r: 1}", "adapter.r=2"],
            ["override adapter.r=2: `adapter={r: 1}` sets the same key"],
        ),
        (
            ["adapter.r=2", "adapter={r: 1}"],
            ["override adapter={r: 1}: `adapter.r=2` sets the same key"],
        ),
        (["seed=[", "x"], ["override seed=[: not valid YAML", "override x: expected key=value"]),
        (
            ["data.path.x=3"],
            ["override data.path.x=3: nothing can be set beneath `data.path` ('clients.js"],
        ),
    ],
)
def test_broken_overrides(tmp_path: Path, overrides: list[str], lines: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, *overrides)

    told = caught.value.message.splitlines()[1:]
    assert len(told) == len(lines)
    assert all(one.startswith(f"  {line}") for one, line in zip(told, lines, strict=True))


def test_an_override_beneath_a_value_the_file_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "adapter.r.x=4")

    assert caught.value.message.splitlines()[1:] == [
        "  override adapter.r.x=4: adapter.r: expected a whole number, got a mapping"
    ]


def test_overrides_leave_the_data_they_are_given_alone() -> None:
    data: dict[str, Value] = {"a": {"b": 1}}

    merged = apply_overrides(data, parse_overrides(["a.b=2", "a.c=3"], "x"), "x")

    assert merged == {"a": {"b": 2, "c": 3}}
    assert data == {"a": {"b": 1}}


def test_options_of_the_old_method_are_still_errors(tmp_path: Path) -> None:
    text = MINIMAL.replace("{name: pflalign}", "{name: pflalign, beta: 0.5}")

    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "method.name=fedavg", text=text)

    assert caught.value.message.splitlines()[1:] == [
        "  line 6  method.beta: `beta` is an option of pflalign, not of fedavg"
    ]


def test_relative_paths_of_the_file_start_beside_it(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)

    loaded = load(tmp_path, text=f"{MINIMAL}runtime: {{output_dir: out}}\n")

    assert loaded.recipe.data.path == str(tmp_path / "clients.jsonl")
    assert loaded.recipe.backbone.model_name_or_path == str(tmp_path / "org" / "tiny")
    assert loaded.run_folder == tmp_path / "out" / "small"


def test_relative_paths_of_overrides_and_defaults_start_here(
    tmp_path: Path, elsewhere: Path
) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)

    recipe = load(
        tmp_path, "data={path: mine.jsonl}", "backbone.model_name_or_path=org/tiny"
    ).recipe

    assert recipe.data.path == str(elsewhere / "mine.jsonl")
    assert recipe.backbone.model_name_or_path == "org/tiny"  # no such folder here: a Hub id
    assert recipe.runtime.output_dir == str(elsewhere / "runs")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("org/tiny", "org/tiny"),
        ("./org", "{recipe}/org"),
        ("../org", "{parent}/org"),
        ("/srv/org", "/srv/org"),
        ("~/org", "{home}/org"),
    ],
)
def test_what_counts_as_a_model_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, read: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    places = {"recipe": tmp_path, "parent": tmp_path.parent, "home": tmp_path / "home"}

    loaded = load(tmp_path, text=MINIMAL.replace("org/tiny", f"'{written}'"))

    assert loaded.recipe.backbone.model_name_or_path == read.format(**places)


def test_a_linked_file_keeps_the_name_it_has_in_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "clients.jsonl").symlink_to("blob")

    recipe = load(tmp_path, text=MINIMAL.replace("clients.jsonl", "deep/../clients.jsonl")).recipe

    assert recipe.data.path == str(tmp_path / "clients.jsonl")


def test_a_linked_folder_keeps_the_name_it_has_in_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    recipe = load(tmp_path, text=MINIMAL.replace("clients.jsonl", "link/clients.jsonl")).recipe

    assert recipe.data.path == str(tmp_path / "link" / "clients.jsonl")


def test_the_resolved_recipe_loads_to_the_same_recipe(tmp_path: Path, elsewhere: Path) -> None:
    loaded = load(
        tmp_path, "data.client_column='1e-4'", "data.split_column='\\u2028: é #'", "seed=7"
    )
    copy = elsewhere / "recipe.resolved.yaml"
    copy.write_text(loaded.resolved(), encoding="utf-8")

    again = load_recipe(copy)

    assert again.recipe == loaded.recipe
    assert again.resolved() == loaded.resolved()


def test_a_number_of_clients_stands_in_the_place_of_a_share(
    tmp_path: Path, elsewhere: Path
) -> None:
    loaded = load(tmp_path, "federation.clients_per_round=4")
    assert loaded.recipe.federation.fraction_train is None
    assert loaded.recipe.federation.clients_per_round == 4
    copy = elsewhere / "recipe.resolved.yaml"
    copy.write_text(loaded.resolved(), encoding="utf-8")

    assert load_recipe(copy).recipe == loaded.recipe
    shared = load_recipe(copy, ["federation={rounds: 2}"]).recipe.federation
    assert (shared.fraction_train, shared.clients_per_round) == (1.0, None)


def test_a_trace_is_found_as_the_data_are(tmp_path: Path, elsewhere: Path) -> None:
    inside = MINIMAL.replace("{rounds: 2}", "{rounds: 2, availability: traces/day.csv}")
    loaded = load(tmp_path, text=inside)
    assert loaded.recipe.federation.availability == str(tmp_path / "traces" / "day.csv")
    copy = elsewhere / "recipe.resolved.yaml"
    copy.write_text(loaded.resolved(), encoding="utf-8")

    assert load_recipe(copy).recipe.federation == loaded.recipe.federation
    given = load(tmp_path, "federation.availability=day.csv").recipe.federation.availability
    assert given == str(elsewhere / "day.csv")


def test_the_resolved_recipe_says_everything_in_schema_order(tmp_path: Path) -> None:
    loaded = load(tmp_path)

    data = read_yaml(loaded.resolved().encode(), "resolved").data

    assert [*data, "compare"] == list(type(loaded.recipe).model_fields)  # no part of a run
    for name in data:
        section = getattr(loaded.recipe, name)
        if hasattr(section, "model_dump"):
            assert data[name] == section.model_dump()
            assert list(section.model_dump()) == list(type(section).model_fields)


@settings(max_examples=200, deadline=None)
@given(
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
        max_size=30,
    )
    | st.sampled_from(["yes", "1e-4", "~", "", "0o7", " a", "a ", "- a", "a: b", "#", "...", "---"])
    | st.from_regex(r"[-+.0-9exo:#]{1,6}", fullmatch=True)
)
def test_any_text_survives_writing_and_reading(text: str) -> None:
    written = write_yaml({"key": text, "list": [text, [text]]})

    assert read_yaml(written.encode(), "x").data == {"key": text, "list": [text, [text]]}


@pytest.mark.parametrize("number", [0.1, 1e-5, 5.0, 1e300, 3, 10**30, True, None])
def test_any_number_survives_writing_and_reading(number: object) -> None:
    read = read_yaml(write_yaml({"key": number}).encode(), "x").data["key"]

    assert read == number
    assert type(read) is type(number)


def test_a_missing_recipe_and_a_folder(tmp_path: Path) -> None:
    write(tmp_path)

    with pytest.raises(RecipeError, match=r"nope\.yaml: there is no such recipe file\n  hint"):
        load_recipe(tmp_path / "nope.yaml")
    with pytest.raises(
        RecipeError, match=r"a folder, not a recipe file\n  hint: it holds recipe\.yaml"
    ):
        load_recipe(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_recipe(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.chmod(0)

    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(path)


def test_a_recipe_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")

    with pytest.raises(RecipeError, match=r"recipe\.yaml: cannot be read \(not an ordinary file\)"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("key", ["data.path", "backbone.model_name_or_path", "runtime.output_dir"])
def test_a_path_that_is_too_long(key: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"{key}=/{'x/' * 3000}")

    assert caught.value.message == (
        f"{tmp_path / 'recipe.yaml'}: {key}: no such path '/{'x/' * 97}x... "
        "(6000 bytes, and a path has less than 4096)"
    )


def test_a_model_that_is_too_long_for_a_folder_is_left_as_it_is(tmp_path: Path) -> None:
    name = "x" * 300

    recipe = load(tmp_path, f"backbone.model_name_or_path={name}").recipe

    assert recipe.backbone.model_name_or_path == name


def test_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")

    with pytest.raises(RecipeError, match=r"no such path .* name that is not UTF-8"):
        load(folder)


def test_a_home_that_cannot_be_found(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.path: no such path '~no-such-user/x'"):
        load(tmp_path, "data.path=~no-such-user/x")


def test_a_loaded_recipe_cannot_be_changed(tmp_path: Path) -> None:
    recipe = load(tmp_path).recipe

    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_every_field_of_the_schema_is_described() -> None:
    schema = json_schema()

    for where in (schema, *schema["$defs"].values()):
        assert where["additionalProperties"] is False
        for key, field in where["properties"].items():
            assert field.get("description"), key

"""The privacy levers in a recipe: their defaults, what goes with them, and what is said if not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfl_lm.cli.app import app
from pfl_lm.errors import PflError, RecipeError
from pfl_lm.preflight import check_recipe, preflight
from pfl_lm.recipe import ClientLevelOptions, PrivacyOptions, RecordLevelOptions
from pfl_lm.recipe.privacy import loose_deltas
from pfl_lm.recipe.reference import reference
from pfl_lm.recipe.suggest import section_class
from tests.recipe.minimal import MINIMAL, load, write

RECORD = "privacy.record_level={noise_multiplier: 1.0, max_grad_norm: 0.5, delta: 1e-5}"
CLIENT = "privacy.client_level={noise_multiplier: 1.0, clip_norm: 0.5, delta: 1e-5}"
UNIFORM = "method.weighting=uniform"


def test_there_is_none_unless_asked_for(tmp_path: Path) -> None:
    privacy = load(tmp_path).recipe.privacy
    assert privacy.record_level is None
    assert privacy.first_asked is None


def test_record_level(tmp_path: Path) -> None:
    loaded = load(tmp_path, RECORD)
    options = RecordLevelOptions(noise_multiplier=1.0, max_grad_norm=0.5, delta=1e-5)
    assert loaded.recipe.privacy.record_level == options
    assert loaded.recipe.privacy.first_asked == "record_level"
    again = load(tmp_path, text=loaded.resolved())
    assert again.recipe == loaded.recipe


def test_client_level_and_both(tmp_path: Path) -> None:
    loaded = load(tmp_path, CLIENT, UNIFORM)
    options = ClientLevelOptions(noise_multiplier=1.0, clip_norm=0.5, delta=1e-5)
    assert loaded.recipe.privacy.client_level == options
    assert loaded.recipe.privacy.first_asked == "client_level"
    both = load(tmp_path, CLIENT, RECORD, UNIFORM)
    assert both.recipe.privacy.client_level == options
    assert both.recipe.privacy.record_level is not None
    assert load(tmp_path, text=both.resolved()).recipe == both.recipe


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["privacy.record_level={}"],
            "privacy.record_level.delta: missing. Add it, for example `delta: 1e-05`",
        ),
        (
            ["privacy.record_level.noise_multiplier=0"],
            "override privacy.record_level.noise_multiplier=0: must be a number greater than 0, "
            "got 0",
        ),
        (
            [RECORD.replace("delta: 1e-5", "delta: 1")],
            "privacy.record_level.delta: must be a number greater than 0 and less than 1, got 1",
        ),
        (
            [RECORD.replace("max_grad_norm", "bound")],
            "privacy.record_level.bound: unknown key. Keys of `privacy.record_level`: "
            "noise_multiplier, max_grad_norm, delta",
        ),
        (
            [RECORD.replace("noise_multiplier", "noise_multiplyer")],
            "privacy.record_level.noise_multiplyer: unknown key. Did you mean "
            "`privacy.record_level.noise_multiplier`?",
        ),
        (["privacy.record_level=3"], "got 3, expected a mapping such as `record_level: {noise_mu"),
        (["privacy=3"], "got 3, expected a mapping such as `privacy: {record_level: {noise_multi"),
        (["privacy.dp_sgd=3"], "unknown key. Did you mean `privacy.record_level`?"),
        (["dp.x=3"], "unknown key. Did you mean `privacy`?"),
        (["training.max_grad_norm=3"], "Did you mean `privacy.record_level.max_grad_norm`?"),
        (
            [RECORD, "training.learning_rate=auto"],
            "override training.learning_rate=auto: auto looks at clients' gradients and losses, "
            "which `privacy.record_level` does not cover; give a number",
        ),
        (
            [RECORD, "method.weighting=tokens"],
            "override method.weighting=tokens: tokens would tell how long a client's rows are, "
            "which `privacy.record_level` does not cover; use `examples` or `uniform`",
        ),
        (
            [RECORD, "runtime.diagnostics=true"],
            "override runtime.diagnostics=true: true would tell of gradients and offsets more than "
            "`privacy.record_level` accounts for; leave it out",
        ),
        (
            [RECORD, "data.group_by_length=true"],
            "override data.group_by_length=true: with `privacy.record_level` chance alone draws "
            "the rows of a step, or they would not be protected as accounted for; leave it out",
        ),
        (
            [RECORD, "training.gradient_checkpointing=true"],
            "override training.gradient_checkpointing=true: with `privacy.record_level` each row's "
            "gradient is looked at inside of the layers, which would run twice; leave it out",
        ),
        (
            [RECORD, "backbone.device_map=auto"],
            "override backbone.device_map=auto: with `privacy.record_level` each row's gradient is "
            "needed on one device; leave it out",
        ),
        (
            [RECORD, "runtime.compile=true"],
            "override runtime.compile=true: with `privacy.record_level` each row's gradient is "
            "looked at inside of the layers, and a compiled one shows nothing; leave it out",
        ),
        (
            [RECORD, "backbone.dtype=float16"],
            "override backbone.dtype=float16: float16 has gradients scaled and steps left out by "
            "what the rows' gradients are, which `privacy.record_level` does not account for; use "
            "`bfloat16` or `float32`",
        ),
        (
            [CLIENT, UNIFORM, "training.learning_rate=auto"],
            "override training.learning_rate=auto: auto looks at clients' gradients and losses, "
            "which `privacy.client_level` does not cover; give a number",
        ),
        (
            [CLIENT],
            "method.weighting: `privacy.client_level` needs all clients to count alike, which by "
            "`examples` they do not; write `weighting: uniform`",
        ),
        (
            [CLIENT, UNIFORM, "aggregation.rule=median"],
            "override aggregation.rule=median: `privacy.client_level` clips and averages in its "
            "own way, so `median` cannot be used; use `mean`",
        ),
        (
            [CLIENT, "method.name=local"],
            f"override {CLIENT}: `local` sends nothing to the server, so there is nothing to "
            "protect; leave it out",
        ),
        (
            [CLIENT, "method.name=scaffold"],
            f"override {CLIENT}: scaffold's server makes a control variate of the uploads too, for "
            "which no noise is accounted for; leave it out, or choose another method",
        ),
        (
            [CLIENT.replace("clip_norm", "clip"), UNIFORM],
            "privacy.client_level.clip: unknown key. Did you mean "
            "`privacy.client_level.clip_norm`?",
        ),
        (
            [CLIENT.replace("0.5", "0"), UNIFORM],
            "privacy.client_level.clip_norm: must be a number greater than 0, got 0",
        ),
    ],
)
def test_what_does_not_go_is_told(tmp_path: Path, overrides: list[str], line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, *overrides)
    assert line in caught.value.message


def test_lines_of_the_file_are_found_below_two_sections(tmp_path: Path) -> None:
    text = f"{MINIMAL}privacy:\n  record_level:\n    noise_multiplier: 1\n    max_grad_norm: -1\n"
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text=f"{text}    delta: 0.1\n")
    assert caught.value.message.splitlines()[1] == (
        "  line 10  privacy.record_level.max_grad_norm: must be a number greater than 0, got -1"
    )


@pytest.mark.parametrize("overrides", [[RECORD], [RECORD, "training.max_steps=0"]])
def test_without_opacus_a_lever_is_refused_before_anything_starts(
    tmp_path: Path, clients_jsonl: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    """Also if the recipe has another fault: all problems at once."""
    monkeypatch.setattr("pfl_lm.recipe.checks.find_spec", lambda name: None)
    fixed = [f"runtime.output_dir={tmp_path}", "data.split_column=split"]
    with pytest.raises(PflError) as caught:
        check_recipe(write(tmp_path), [*fixed, *overrides])
    assert (
        'privacy.record_level: opacus is not installed here\n  hint: pip install "pfl-lm[privacy]"'
    ) in str(caught.value)
    check_recipe(write(tmp_path), fixed)


def test_with_opacus_it_is_not_imported_by_looking(tmp_path: Path, clients_jsonl: Path) -> None:
    known = "opacus" in sys.modules
    loaded = load(tmp_path, RECORD, f"runtime.output_dir={tmp_path}", "data.split_column=split")
    preflight(loaded)
    assert ("opacus" in sys.modules) == known


def test_the_page_has_the_sections_within() -> None:
    assert section_class("privacy.record_level") is RecordLevelOptions
    assert "\n### privacy.record_level\n" in reference()
    assert "| `privacy.record_level` | [section](#privacyrecord_level) | `null` |" in reference()
    assert "| `privacy.record_level.delta` | number > 0, < 1 |  |" in reference()


def test_deltas_that_bound_nothing_are_told() -> None:
    def told(record: float, client: float) -> list[str]:
        privacy = PrivacyOptions(
            record_level=RecordLevelOptions(noise_multiplier=1.0, max_grad_norm=1.0, delta=record),
            client_level=ClientLevelOptions(noise_multiplier=1.0, clip_norm=1.0, delta=client),
        )
        return loose_deltas(privacy, {"a": 40, "b": 100, "c": 3})

    assert told(1e-5, 1e-3) == []
    assert told(0.0099, 0.33) == []
    assert told(0.01, 0.4) == [
        "privacy.record_level.delta: 0.01 is not below 1 / 100, one of 100 rows of b, so that one "
        "may be told outright; take 0.001 or less",
        "privacy.client_level.delta: 0.4 is not below 1 / 3, one of 3 clients, so that one may be "
        "told outright; take 0.03 or less",
    ]
    assert loose_deltas(PrivacyOptions(), {"a": 1}) == []


@pytest.mark.parametrize("delta", [1e-3, 0.5])
def test_validate_tells_them(tmp_path: Path, clients_jsonl: Path, delta: float) -> None:
    lever = RECORD.replace("1e-5", str(delta))
    fixed = [f"runtime.output_dir={tmp_path}", "data.split_column=split", lever]
    result = CliRunner().invoke(app, ["validate", str(write(tmp_path)), *fixed])
    assert result.exit_code == 0
    note = "  note        privacy.record_level.delta: 0.5 is not below 1 / 5, one of 5 rows of al"
    assert (note in result.stdout) == (delta == 0.5)

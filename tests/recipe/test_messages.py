"""What is said of unknown keys and wrong values: where, what is wrong, what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfl_lm.errors import RecipeError
from tests.recipe.minimal import HEAD, PFLALIGN, load

KEYS = [
    ("adapter:\n  rank: 8\n", ["line 7  adapter.rank: unknown key. Did you mean `adapter.r`?"]),
    (
        "adapter: {lora_alfa: 8}",
        ["adapter.lora_alfa: unknown key. Did you mean `adapter.lora_alpha`?"],
    ),
    ("adapter: {lr: 8}", ["adapter.lr: unknown key. Did you mean `training.learning_rate`?"]),
    (
        "adapter: {max_steps: 8}",
        ["adapter.max_steps: unknown key. Did you mean `training.max_steps`?"],
    ),
    ("adapter: {R: 8}", ["adapter.R: unknown key. Did you mean `adapter.r`?"]),
    (
        "adapter: {zzz: 8}",
        ["adapter.zzz: unknown key. Keys of `adapter`: r, lora_alpha, lora_dropout, "],
    ),
    ("beta: 0.5", ["line 6  beta: unknown key. Did you mean `method.beta`?"]),
    ("adaptor: {}", ["line 6  adaptor: unknown key. Did you mean `adapter`?"]),
    ("lora: {}", ["line 6  lora: unknown key. Did you mean `adapter`?"]),
    ("epochs: 1", ["line 6  epochs: unknown key. Did you mean `training.local_epochs`?"]),
    ("adapter.r: 1", ["line 6  adapter.r: unknown key. Nest it: `r:` on a line of its own"]),
]
VALUES = [
    ("seed: true", ["line 6  seed: expected a whole number, got true"]),
    ("seed: '8'", ["line 6  seed: expected a whole number, got '8'"]),
    ("seed: -1", ["line 6  seed: must be a whole number from 0 to 9223372036854775807, got -1"]),
    ("adapter: {r: 8.0}", ["adapter.r: expected a whole number, got 8.0"]),
    ("adapter: {r: 0}", ["adapter.r: must be a whole number from 1 to 1024, got 0"]),
    ("adapter: {r: 1025}", ["adapter.r: must be a whole number from 1 to 1024, got 1025"]),
    ("adapter: {lora_alpha: x}", ["adapter.lora_alpha: expected a number, got 'x'"]),
    ("adapter: {lora_alpha: true}", ["adapter.lora_alpha: expected a number, got true"]),
    (
        "adapter: {lora_alpha: 0}",
        ["adapter.lora_alpha: must be a number greater than 0 and at most 1000000, got 0"],
    ),
    (
        "adapter: {lora_alpha: .inf}",
        ["adapter.lora_alpha: must be a finite number greater than 0 and at most 1000000, got inf"],
    ),
    (
        "adapter: {lora_dropout: 1}",
        ["adapter.lora_dropout: must be a number of at least 0 and less than 1, got 1"],
    ),
    (
        "adapter: {target_modules: q_proj}",
        ["adapter.target_modules: expected a list such as [a, b], got"],
    ),
    ("adapter: {target_modules: []}", ["adapter.target_modules: must name at least one module"]),
    ("adapter: {target_modules: [q, q]}", ["adapter.target_modules[1]: `q` is there twice"]),
    (
        "adapter: {target_modules: [lm_head]}",
        ["adapter.target_modules[0]: `lm_head` cannot be adapted"],
    ),
    (
        "adapter: {target_modules: [q, model.embed_tokens]}",
        ["adapter.target_modules[1]: `model.embed_tokens` cannot be adapted"],
    ),
    (
        "adapter:\n  layers_to_transform:\n    - 1\n    - -2\n    - x\n",
        [
            "line 9  adapter.layers_to_transform[1]: must be a whole number of at least 0, got -2",
            "line 10  adapter.layers_to_transform[2]: expected a whole number, got 'x'",
        ],
    ),
    ("adapter: {layers_to_transform: []}", ["adapter.layers_to_transform: must not be empty"]),
    (
        "adapter: {layers_to_transform: [1, 1]}",
        ["adapter.layers_to_transform: each layer may be named once"],
    ),
    ("adapter:", ["line 6  adapter: is empty; expected a mapping such as `adapter: {r: 8}`"]),
    ("adapter: 3", ["line 6  adapter: got 3, expected a mapping such as `adapter: {r: 8}`"]),
    ("runtime: {threads: 0}", ["runtime.threads: must be a whole number from 1 to 1024, got 0"]),
    (
        f"adapter: {{lora_alpha: {10**300}}}",
        ["adapter.lora_alpha: must be a number greater than 0 "],
    ),
    (
        "runtime: {threads: 1000000}",
        ["runtime.threads: must be a whole number from 1 to 1024, got"],
    ),
    ("runtime: {output_dir: ''}", ["runtime.output_dir: must not be empty"]),
    ("runtime: {output_dir: 3}", ["runtime.output_dir: expected text, got 3; put it in quotes"]),
]


@pytest.mark.parametrize(("extra", "lines"), [*KEYS, *VALUES])
def test_each_problem_has_its_line(tmp_path: Path, extra: str, lines: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text=f"{HEAD}{extra.rstrip()}\n{PFLALIGN}")

    head, *told = caught.value.message.splitlines()
    assert head == f"{tmp_path / 'recipe.yaml'}: {len(lines)} problem{'s' * (len(lines) > 1)}"
    for one, line in zip(told, lines, strict=True):
        start = "  " if line.startswith("line ") else "  line 6  "
        assert one.startswith(f"{start}{line}")


def test_a_key_of_another_section(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown key\. Did you mean `data\.max_length`\?"):
        load(tmp_path, "training.max_length=8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "..",
            "must be 1 to 80 letters, digits, `.`, `_` or `-`, the first a letter or a digit, "
            "got '..'",
        ),
        ("a/b", "must be 1 to 80 letters"),
        ("é", "must be 1 to 80 letters"),
        ('"a\\n"', "must be 1 to 80 letters"),
        ("a" * 81, "must be 1 to 80 letters"),
        ("2024", "expected text, got 2024; put it in quotes"),
        ("", "expected text, got nothing (null)"),
    ],
)
def test_run_names(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text=f"{HEAD}{PFLALIGN}".replace("name: small", f"name: {name}"))

    assert f"\n  line 1  name: {message}" in caught.value.message


def test_run_names_of_80_characters_are_fine(tmp_path: Path) -> None:
    name = "0._-" * 20

    assert load(tmp_path, f"name={name}").recipe.name == name


def test_all_problems_at_once_sorted_by_line_then_by_override(tmp_path: Path) -> None:
    text = """\
training:
  learning_rate: fast
  batch_size: 4
name: x
adapter:
  rank: 8
  lora_alpha: x
data: {}
method: {name: pflalign}
"""
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "adapter.r=0", "federation.rounds=x", "adapter.lora_alpha=.nan", text=text)

    assert caught.value.message.splitlines()[1:] == [
        "  line 2  training.learning_rate: expected a number, got 'fast'",
        "  line 3  training.batch_size: unknown key. "
        "Did you mean `training.per_device_train_batch_size`?",
        "  line 6  adapter.rank: unknown key. Did you mean `adapter.r`?",
        "  line 8  data.path: missing. Add it, for example `path: clients.jsonl`; "
        "or name a `package`, or a `dataset_name`",
        "  backbone: missing. Add it, for example "
        "`backbone: {model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct}`",
        "  override adapter.r=0: must be a whole number from 1 to 1024, got 0",
        "  override federation.rounds=x: expected a whole number, got 'x'",
        "  override adapter.lora_alpha=.nan: must be a finite number greater than 0 "
        "and at most 1000000, got nan",
    ]


@pytest.mark.parametrize(
    "key",
    [
        "federation.rounds",
        *("training.max_steps", "training.local_epochs", "training.gradient_accumulation_steps"),
        *("training.per_device_train_batch_size", "training.per_device_eval_batch_size"),
    ],
)
def test_counts_have_an_end(tmp_path: Path, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"{key}=1000001")

    assert f"{key}=1000001: must be a whole number from 1 to 1000000, got 1000001" in str(
        caught.value
    )


def test_a_rate_that_no_float32_holds(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"greater than 0 and at most 1e\+38, got 1e\+39"):
        load(tmp_path, "training.learning_rate=1e39")


def test_long_values_are_cut_and_nothing_of_pydantic_shows(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"adapter.r={'x' * 1000}", "training.learning_rate=[1]")

    assert "pydantic" not in caught.value.message
    assert "Input should" not in caught.value.message
    assert caught.value.message.endswith(
        "training.learning_rate=[1]: expected a number, got a list"
    )
    assert f": expected a whole number, got '{'x' * 56}..." in caught.value.message


LONG = [
    (f"adapter.{'k' * 5000}=1", ": unknown key. Keys of `adapter`: r, lora_alpha, "),
    (f"adapter={{{'k' * 900}: 1}}", f"adapter.{'k' * 57}...: unknown key. Keys of `adapter`: r, "),
    (f"{'k.' * 5000}=1", "the key 'k.k.k."),
    (f"{'k.' * 5000}k=1", ": k: unknown key. Keys of a recipe: name, seed"),
    (f"data.path.{'k.' * 5000}k=1", "nothing can be set beneath `data.path` ('clients.jsonl')"),
    (f"adapter.target_modules=[{'k' * 5000}, {'k' * 5000}]", f"`{'k' * 57}...` is there twice"),
    (f"name={'k' * 5000}", f"the first a letter or a digit, got '{'k' * 56}..."),
    (f"backbone.gguf_file=/{'k' * 5000}", f"inside the package, got '/{'k' * 55}..."),
    (f"x={'&a ' * 5000}", "anchor `&a`"),
]


@pytest.mark.parametrize(("override", "said"), LONG)
def test_long_names_and_overrides_are_cut(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, override)

    assert said in caught.value.message
    assert f"override {override[:197]}...: " in caught.value.message
    assert len(caught.value.message) < 1000

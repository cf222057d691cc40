"""The ``compare`` section: what a method's text stands for, and every way to get it wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pfl_lm.errors import PflError
from pfl_lm.preflight import check_recipe
from pfl_lm.recipe.compared import ComparedMethod
from pfl_lm.recipe.contenders import Contender, contenders
from pfl_lm.recipe.draft import Draft, draft_of
from pfl_lm.recipe.load import check_draft, load_recipe
from pfl_lm.recipe.schema import json_schema
from tests.tiny import tiny_recipe

BASE = """\
name: small
backbone: {model_name_or_path: org/tiny}
data: {path: clients.jsonl}
federation: {rounds: 2}
training: {learning_rate: 0.01, max_steps: 3, optimizer: adamw}
method: {name: pflalign, precondition_target: update, update_scale: match}
"""
WITH_SGD = BASE.replace("adamw", "sgd")


def draft(compare: str, base: str = BASE) -> Draft:
    return draft_of(f"{base}compare: {compare}\n".encode(), Path("r.yaml"))


def one(method: str, base: str = BASE) -> Contender:
    """Return the contender that a text stands for."""
    found = contenders(draft(f"{{methods: ['{method}']}}", base))
    assert [each.label for each in found if each.added] in ([], ["local"])
    return found[0]


def facts(contender: Contender) -> tuple[str, str | None, tuple[Any, ...], dict[str, Any]]:
    recipe = contender.loaded.recipe
    changed = recipe.method.model_dump(exclude_defaults=True)
    return contender.label, recipe.training.optimizer, contender.rates, changed


TEXTS: list[tuple[str, str, str, tuple[Any, ...], dict[str, Any]]] = [
    ("fedavg", "fedavg", "adamw", (0.01,), {}),
    ("fedavg:sgd@0.5/1", "fedavg-sgd", "sgd", (0.5, 1.0), {}),
    ("fedavg:adamw@1e-3", "fedavg-adamw", "adamw", (0.001,), {}),
    ("fedavg:weighting=uniform", "fedavg-weighting-uniform", "adamw", (0.01,), {}),
    ("plain=fedavg:sgd@1", "plain", "sgd", (1.0,), {}),
    ("pflalign@20/auto", "pflalign", "sgd", (20.0, "auto"), {}),
    ("pflalign:paper@1", "pflalign-paper", "sgd", (1.0,), {"preset": "paper", "eps": 1e-12}),
    ("pflalign:optimizer=sgd@1", "pflalign-sgd", "sgd", (1.0,), {}),
    ("pflalign:preset=no_correction@1", "pflalign-no_correction", "sgd", (1.0,), {}),
    (
        "pflalign:preconditioner=false:beta=0.5@1",
        "pflalign-preconditioner-false-beta-0.5",
        "sgd",
        (1.0,),
        {"preconditioner": False, "beta": 0.5},
    ),
    ("recipe", "pflalign-recipe", "adamw", (0.01,), {"update_scale": "match"}),
    ("recipe:full_correction", "pflalign-recipe-full_correction", "adamw", (0.01,), {}),
]


@pytest.mark.parametrize(("text", "label", "optimizer", "rates", "changed"), TEXTS)
def test_a_text_says_method_preset_optimizer_options_and_rates(
    text: str, label: str, optimizer: str, rates: tuple[Any, ...], changed: dict[str, Any]
) -> None:
    if len(label) > 32:
        text, label = f"short={text}", "short"
    found = facts(one(text))
    assert found[:3] == (label, optimizer, rates)
    assert changed.items() <= found[3].items()


def test_a_mapping_says_the_same_as_a_text() -> None:
    mappings = (
        "{methods: [{method: {name: fedavg}, training: {optimizer: sgd, learning_rates: [0.5, 1]}},"
        " {label: half, method: {name: recipe, preset: half_correction}}]}"
    )
    texts = "{methods: ['fedavg:sgd@0.5/1', 'half=recipe:half_correction']}"
    assert [facts(c) for c in contenders(draft(mappings))] == [
        facts(c) for c in contenders(draft(texts))
    ]


def test_contenders_differ_in_method_optimizer_and_rate_alone() -> None:
    found = contenders(draft("{methods: ['pflalign@20', 'fedavg:sgd@1', recipe], seeds: [4]}"))
    assert [c.label for c in found] == ["pflalign", "fedavg-sgd", "pflalign-recipe", "local"]
    assert [c.added for c in found] == [False, False, False, True]
    apart = {"method": {"name"}, "training": {"optimizer", "learning_rate"}}
    same = []
    for contender in found:
        recipe = contender.loaded.recipe
        assert recipe.compare is None
        assert recipe.training.learning_rate == contender.rates[0]
        same.append(recipe.model_dump(exclude={"method": True, "training": apart["training"]}))
    assert all(each == same[0] for each in same)


def test_the_recipes_optimizer_is_taken_where_the_method_takes_it() -> None:
    assert facts(one("fedavg@1", WITH_SGD))[1] == "sgd"
    assert facts(one("fedavg@1", BASE))[1] == "adamw"
    assert facts(one("pflalign@1", BASE))[1] == "sgd"  # which adamw would undo


def test_local_is_added_once_and_needs_no_rule_to_average_by() -> None:
    with_rule = BASE + "aggregation: {rule: median}\n"
    found = contenders(draft("{methods: [fedavg], rates: [1, 2]}", with_rule))
    assert [(c.label, c.added, c.rates) for c in found] == [
        ("fedavg", False, (1.0, 2.0)),
        ("local", True, (1.0, 2.0)),
    ]
    assert [c.loaded.recipe.aggregation.rule for c in found] == ["median", "mean"]
    [mine] = contenders(draft("{methods: ['mine=local']}"))
    assert (mine.label, mine.added) == ("mine", False)


def test_local_goes_without_the_servers_noise_and_keeps_its_own() -> None:
    lever = "{noise_multiplier: 1.0, %s: 1.0, delta: 1.0e-5}"
    levers = f"client_level: {lever % 'clip_norm'}, record_level: {lever % 'max_grad_norm'}"
    uniform = BASE.replace("match}", "match, weighting: uniform}") + f"privacy: {{{levers}}}\n"
    found = contenders(draft("{methods: [recipe, 'fedavg:weighting=uniform']}", uniform))
    privacies = [contender.loaded.recipe.privacy for contender in found]
    assert [p.client_level is None for p in privacies] == [False, False, True]
    assert [p.record_level is None for p in privacies] == [False, False, False]


def test_a_recipe_without_the_section_compares_nothing() -> None:
    assert contenders(draft_of(BASE.encode(), Path("r.yaml"))) == ()
    assert contenders(draft("{seeds: [1, 2]}")) == ()


def test_a_run_of_its_own_knows_nothing_of_it(tmp_path: Path) -> None:
    plain = load_recipe(tiny_recipe(tmp_path))
    compared = load_recipe(tiny_recipe(tmp_path, compare={"methods": ["fedavg"]}))
    assert compared.recipe != plain.recipe
    assert compared.resolved() == plain.resolved()


WRONG: list[tuple[str, str]] = [
    (
        "fedavgg",
        "compare.methods[0]: there is no method 'fedavgg'. Did you mean `fedavg`? There are ",
    ),
    ("a=b=fedavg", "compare.methods[0].label: must be 1 to 32 letters, digits, "),
    (
        "pflalign:half",
        "compare.methods[0]: 'half': no preset of pflalign (paper, no_preconditioner, "
        "no_correction, half_correction, full_correction, hard_correction, no_realignment, sgd), "
        "and no optimizer (sgd, adamw); an option is written as key=value. Did you mean "
        "`half_correction`?",
    ),
    (
        "fedavg:foo",
        "compare.methods[0]: 'foo': fedavg has no presets, and no optimizer (sgd, adamw); an "
        "option is written as key=value",
    ),
    (
        "pflalign:sgd@1",
        "compare.methods[0]: `sgd` is an optimizer and a preset of pflalign; write "
        "`optimizer=sgd` or `preset=sgd`",
    ),
    (
        "fedavg:sgd:optimizer=adamw",
        "compare.methods[0]: `optimizer` is there twice, in 'fedavg:sgd:optimizer=adamw'",
    ),
    (
        "pflalign:max_steps=3@1",
        "compare.methods[0]: `max_steps` is the same for all methods: set `training.max_steps`",
    ),
    ("fedavg:weighting=[", "compare.methods[0]: 'weighting=[': "),
    (
        "fedavg@x",
        "compare.methods[0].training.learning_rates[0]: expected a number, got 'x'",
    ),
    (
        "fedavg@1/-1",
        "compare.methods[0].training.learning_rates[1]: must be a number greater than 0.0, got -1",
    ),
    ("fedavg@1/1.0", "compare.methods[0].training.learning_rates[1]: 1.0 is there twice"),
    (
        "fedavg:optimizer=adam@1",
        "compare.methods[0].training.optimizer: must be one of sgd, adamw, got 'adam'. Did you "
        "mean `adamw`?",
    ),
    (
        "fedavg:beta=0.5",
        "compare.methods[0] (fedavg): method.beta: `beta` is an option of ",
    ),
    (
        "pflalign:preconditoner=false@1",
        "compare.methods[0] (pflalign): method.preconditoner: unknown key. Did you mean "
        "`method.preconditioner`?",
    ),
    (
        "pflalign:adamw@1",
        "compare.methods[0] (pflalign): training.optimizer: AdamW normalises a per-coordinate ",
    ),
    (
        "fedavg@auto",
        "compare.methods[0] (fedavg): training.learning_rate: auto is for pflalign's ",
    ),
    (
        "fedavg:sgd",
        "compare.methods[0] (fedavg): needs learning rates: training.learning_rate, 0.01, is for "
        "adamw and this is sgd; add @RATE/RATE to it, or give compare.rates (--rates)",
    ),
    (
        "Base=fedavg",
        "compare.methods[0] (Base): label `Base`: the untouched backbone is called that",
    ),
    (
        "pflalign:precondition_target=update:update_scale=match",
        "compare.methods[0] (pflalign): its label must be 1 to 32 letters, digits, `.`, `_` or "
        "`-`, the first a letter or a digit, got "
        "'pflalign-precondition_target-update-update_scale-match'; give it one, as in "
        "short=pflalign…",
    ),
]


def problems(compare: str, base: str = BASE) -> list[str]:
    """Return the lines of what is wrong, the recipe's own first."""
    lines = []
    for check in (check_draft, contenders):
        try:
            check(draft(compare, base))
        except PflError as error:
            lines += str(error).splitlines()[1:]
    return [line.removeprefix("  ") for line in lines]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_what_is_wrong_with_a_method_is_said_and_where(text: str, said: str) -> None:
    [found] = problems(f"{{methods: ['{text}']}}")
    assert found.startswith(f"line 7  {said}")


SECTIONS: list[tuple[str, list[str]]] = [
    ("[1]", ["line 7  compare: got a list, expected a mapping such as `compare: {methods: ["]),
    ("{method: []}", ["line 7  compare.method: unknown key. Did you mean `compare.methods`?"]),
    (
        "{methods: [3]}",
        ["line 7  compare.methods[0]: must be a method such as `fedavg:sgd`, or a mapping, got 3"],
    ),
    (
        "{methods: [{label: a}]}",
        ["line 7  compare.methods[0].method: missing. Add it, for example `method: {name: fedavg}"],
    ),
    (
        "{methods: [{method: {name: fedavg}, training: {lr: 1}}]}",
        ["line 7  compare.methods[0].training.lr: unknown key. Did you mean "],
    ),
    (
        "{methods: [{method: {}}]}",
        ["line 7  compare.methods[0] (None): method.name: missing. Add one of "],
    ),
    ("{seeds: [0, 0]}", ["line 7  compare.seeds[1]: 0 is there twice"]),
    ("{seeds: [-1]}", ["line 7  compare.seeds[0]: must be a whole number of at least 0, got -1"]),
    ("{rates: [0]}", ["line 7  compare.rates[0]: must be a number greater than 0.0, got 0"]),
    (
        "{methods: [fedavg, FedAvg=local]}",
        ["line 7  compare.methods[1] (FedAvg): label `FedAvg`: another method has it; give one "],
    ),
    (
        "{methods: [fedavg, fedavgg, 'fedavg:mu=1'], seeds: [x]}",
        [
            "line 7  compare.methods[1]: there is no method 'fedavgg'. ",
            "line 7  compare.seeds[0]: expected a whole number, got 'x'",
            "line 7  compare.methods[2] (fedavg): method.mu: ",
        ],
    ),
]


@pytest.mark.parametrize(("compare", "said"), SECTIONS)
def test_what_is_wrong_with_the_section_is_said_all_at_once(compare: str, said: list[str]) -> None:
    found = problems(compare)
    assert len(found) == len(said)
    assert [a for a, b in zip(found, said, strict=True) if not a.startswith(b)] == []


def test_the_recipes_own_problems_are_said_once() -> None:
    broken = BASE.replace("rounds: 2", "rounds: 0").replace("max_steps: 3", "max_steps: 0")
    found = problems("{methods: [fedavg, 'fedavg:mu=1']}", broken)
    assert [line.split(": ")[0] for line in found] == [
        "line 4  federation.rounds",
        "line 5  training.max_steps",
        "line 7  compare.methods[1] (fedavg)",
    ]


def test_validate_checks_the_section_too(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, compare={"methods": ["fedavg:beta=1"]})
    with pytest.raises(PflError, match=r"compare\.methods\[0\] \(fedavg\): method\.beta: "):
        check_recipe(recipe)


def test_editors_are_told_that_a_method_is_a_text_or_a_mapping() -> None:
    items = json_schema()["$defs"]["CompareOptions"]["properties"]["methods"]["items"]
    assert items == {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/ComparedMethod"}]}
    assert ComparedMethod.model_json_schema()["required"] == ["method"]

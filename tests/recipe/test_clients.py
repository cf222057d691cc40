"""`clients`: whom a rule is for, what it changes, and what is said of one that cannot stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfl_lm.cli.app import app
from pfl_lm.errors import PflError, RecipeError
from pfl_lm.preflight import check_recipe
from pfl_lm.recipe import LoadedRecipe, Recipe, load_recipe
from pfl_lm.recipe.contenders import contenders
from pfl_lm.recipe.draft import read_draft
from pfl_lm.resume import differences
from tests.recipe.minimal import HEAD, load, write
from tests.tiny import tiny_recipe

LOCAL = f"{HEAD}method: {{name: local}}\n"


def with_rules(
    folder: Path, *rules: str, head: str = LOCAL, overrides: tuple[str, ...] = ()
) -> LoadedRecipe:
    text = "".join(f"  - {rule}\n" for rule in rules)
    return load(folder, *overrides, text=f"{head}clients:\n{text}")


def refusal(folder: Path, *rules: str, head: str = LOCAL, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        with_rules(folder, *rules, head=head, overrides=overrides)
    _, line = caught.value.message.splitlines()
    return line.strip()


def test_without_rules_everybody_goes_by_the_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path).recipe
    own = recipe.own("alice", 3)
    assert own.training is recipe.training
    assert own.adapter is recipe.adapter is recipe.largest_adapter
    assert own.max_length == recipe.data.max_length
    assert recipe.own_differences("alice", 3) == ""
    assert not recipe.mixes_ranks


def test_a_rule_is_for_whom_it_matches_in_all_that_it_says(tmp_path: Path) -> None:
    recipe = with_rules(
        tmp_path,
        "{match: {ids: [alice, 'lab-?*']}, max_steps: 1}",
        "{match: {min_train_rows: 5, max_train_rows: 6}, max_steps: 2}",
        "{match: {ids: ['*b'], min_train_rows: 9}, max_steps: 4}",
        "{match: {ids: ['a[0]']}, max_steps: 5}",
    ).recipe
    found = {
        (client, n): recipe.own(client, n).training.max_steps
        for client, n in [
            *(("alice", 3), ("Alice", 3), ("lab-1", 3), ("lab-", 3), ("bob", 4), ("bob", 5)),
            *(("bob", 6), ("bob", 7), ("bob", 9), ("boba", 9), ("a[0]", 1), ("a0", 1)),
        ]
    }
    assert list(found.values()) == [1, 3, 1, 3, 3, 2, 2, 3, 4, 3, 5, 5]


def test_of_two_rules_the_later_one_stands_key_by_key(tmp_path: Path) -> None:
    recipe = with_rules(
        tmp_path,
        "{match: {min_train_rows: 0}, local_epochs: 2, learning_rate: 0.5, max_length: 64}",
        "{match: {ids: [alice]}, max_steps: 7, r: 4}",
        "{match: {ids: [alice]}, r: 2, target_modules: [o_proj]}",
    ).recipe
    alice, bob = recipe.own("alice", 3), recipe.own("bob", 3)
    assert (alice.training.max_steps, alice.training.local_epochs) == (7, None)
    assert (bob.training.max_steps, bob.training.local_epochs) == (None, 2)
    assert alice.training.learning_rate == bob.training.learning_rate == 0.5
    assert alice.max_length == 64
    assert (alice.adapter.r, alice.adapter.lora_alpha) == (2, 4)
    assert alice.adapter.target_modules == ["o_proj"]
    assert bob.adapter is recipe.adapter
    assert recipe.own_differences("alice", 3) == (
        "7 steps, learning rate 0.5, max_length 64, r 2, on o_proj"
    )
    assert recipe.own_differences("bob", 3) == "2 local epochs, learning rate 0.5, max_length 64"


@pytest.mark.parametrize(("r", "alpha"), [(16, 32), (8, 16), (4, 8), (1, 2), (7, 14)])
def test_the_scale_is_the_recipes(tmp_path: Path, r: int, alpha: float) -> None:
    recipe = with_rules(tmp_path, f"{{match: {{ids: [alice]}}, r: {r}}}").recipe
    adapter = recipe.own("alice", 3).adapter
    assert (adapter.r, adapter.lora_alpha) == (r, alpha)
    largest = recipe.largest_adapter
    assert (largest.r, largest.lora_alpha) == (max(r, 8), 2 * max(r, 8))


def test_the_largest_adapter_has_room_for_all_whoever_there_is(tmp_path: Path) -> None:
    largest = with_rules(
        tmp_path,
        "{match: {ids: [nobody-yet]}, r: 12, target_modules: [o_proj, q_proj]}",
        "{match: {ids: [alice]}, r: 2}",
    ).recipe.largest_adapter
    assert largest.r == 12
    assert largest.target_modules == ["q_proj", "v_proj", "o_proj"]


def test_the_resolved_recipe_has_the_rules_and_is_one(tmp_path: Path) -> None:
    loaded = with_rules(
        tmp_path,
        "{match: {ids: ['a: b', \"c'd\"], min_train_rows: 2}, learning_rate: 1e-4}",
        "{match: {max_train_rows: 9}, target_modules: [q_proj], r: 3}",
    )
    (tmp_path / "again.yaml").write_text(loaded.resolved(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml").recipe == loaded.recipe
    assert "null" not in loaded.resolved().split("clients:")[1].splitlines()[0]


def test_a_rule_may_come_from_the_command_line(tmp_path: Path) -> None:
    recipe = load(tmp_path, "clients=[{match: {ids: [alice]}, max_steps: 9}]").recipe
    assert recipe.own("alice", 3).training.max_steps == 9


MATCH = "match: {ids: [alice]}"
KEYS = "max_steps, local_epochs, learning_rate, max_length, r, target_modules"
MESSAGES = [
    (
        "3",
        "clients[0]: must be a rule such as `{match: {ids: [alice]}, max_steps: 8}`, got 3",
    ),
    (f"{{{MATCH}}}", f"clients[0]: changes nothing; it may set {KEYS}"),
    (
        "{max_steps: 3}",
        "clients[0].match: missing. Add it, for example `match: {ids: [alice]}`",
    ),
    (
        "{match: {}, r: 3}",
        "clients[0].match: says of no client that it is meant: give `ids`, or a number of rows",
    ),
    (
        "{match: {min_train_rows: 3, max_train_rows: 2}, r: 3}",
        "clients[0].match.max_train_rows: must be at least `min_train_rows` (3), got 2",
    ),
    ("{match: {ids: alice}, r: 3}", "clients[0].match.ids: expected a list such as [a, b], got 'a"),
    (
        "{match: {id: [alice]}, r: 3}",
        "clients[0].match.id: unknown key. Did you mean `clients[].match.ids`?",
    ),
    (
        f"{{{MATCH}, max_steps: 3, local_epochs: 1}}",
        "clients[0]: needs at most one of `max_steps` and `local_epochs`; both are given",
    ),
    (
        f"{{{MATCH}, lr: 3}}",
        "clients[0].lr: unknown key. Did you mean `clients[].learning_rate`?",
    ),
    (f"{{{MATCH}, r: 0}}", "clients[0].r: must be a whole number from 1 to 1024, got 0"),
    (
        f"{{{MATCH}, learning_rate: auto}}",
        "clients[0].learning_rate: expected a number, got 'auto'",
    ),
    (
        f"{{{MATCH}, target_modules: [lm_head]}}",
        "clients[0].target_modules[0]: `lm_head` cannot be adapted",
    ),
]


@pytest.mark.parametrize(("rule", "message"), MESSAGES)
def test_messages(tmp_path: Path, rule: str, message: str) -> None:
    assert refusal(tmp_path, rule).removeprefix("line 8  ").startswith(message)


def test_rules_are_a_list(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"clients: expected a list such as .a, b., got a mapping"
    ):
        load(tmp_path, text=f"{LOCAL}clients: {{alice: 3}}\n")


@pytest.mark.parametrize("key", ["r: 4", "target_modules: [q_proj]"])
@pytest.mark.parametrize("method", ["fedavg", "pflalign", "scaffold", "ffa_lora", "ditto"])
def test_adapters_of_several_shapes_are_for_some_methods(
    tmp_path: Path, method: str, key: str
) -> None:
    name = key.partition(":")[0]
    said = refusal(tmp_path, f"{{{MATCH}, {key}}}", head=f"{HEAD}method: {{name: {method}}}\n")
    assert said == (
        f"line 8  clients[0].{name}: {method} needs adapters of one shape: the zeros that a "
        "smaller one would be filled up with are no opinion, and would count as one; use local, "
        "flexlora or hetlora, or leave it out"
    )


@pytest.mark.parametrize("method", ["local", "flexlora", "hetlora"])
def test_some_methods_take_them(tmp_path: Path, method: str) -> None:
    head = f"{HEAD}method: {{name: {method}}}\n"
    assert with_rules(tmp_path, f"{{{MATCH}, r: 4}}", head=head).recipe.mixes_ranks


def test_a_rate_of_ones_own_does_not_go_with_auto(tmp_path: Path) -> None:
    head = f"{HEAD}method: {{name: pflalign}}\n"
    auto = ("training.learning_rate=auto",)
    said = refusal(tmp_path, f"{{{MATCH}, learning_rate: 0.1}}", head=head, overrides=auto)
    assert said == (
        "line 8  clients[0].learning_rate: `training.learning_rate: auto` chooses one rate for all "
        "clients and halves it for all; give a number there, or leave this one out"
    )
    with_rules(tmp_path, f"{{{MATCH}, max_steps: 5}}", head=head, overrides=auto)


def test_diagnostics_do_not_go_with_several_shapes(tmp_path: Path) -> None:
    said = refusal(tmp_path, f"{{{MATCH}, r: 4}}", overrides=("runtime.diagnostics=true",))
    assert said == (
        "override runtime.diagnostics=true: true compares clients layer by layer, for which their "
        "adapters need one shape; leave it out, or `clients[0].r`"
    )


@pytest.mark.parametrize("method", ["flexlora", "hetlora"])
def test_methods_with_an_average_of_their_own_take_no_other(tmp_path: Path, method: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"method={{name: {method}}}", "aggregation.rule=median")
    assert (
        f"aggregation.rule=median: {method} averages in its own way, what clients of unlike ranks "
        "have sent, so `median` cannot be used; leave `aggregation` out, or choose another method"
    ) in caught.value.message
    lever = "privacy.client_level={noise_multiplier: 1.0, clip_norm: 1.0, delta: 1e-5}"
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"method={{name: {method}}}", lever)
    assert (
        f"{method} does not average changes w − w_g, for whose length alone noise is accounted "
        "for; leave it out, or choose another method"
    ) in caught.value.message


def checked(folder: Path, **changes: object) -> str:
    with pytest.raises(PflError) as caught:
        check_recipe(tiny_recipe(folder, **changes))
    return str(caught.value)


def test_rules_that_are_for_nobody_are_refused_all_at_once(tmp_path: Path) -> None:
    rules = [
        {"match": {"ids": ["alice", "alcie", "bo*"]}, "max_steps": 1},
        {"match": {"ids": ["x*"]}, "max_steps": 1},
        {"match": {"min_train_rows": 50}, "max_steps": 1},
        {"match": {"ids": ["bob"], "max_train_rows": 1}, "max_steps": 1},
    ]
    assert checked(tmp_path, clients=rules) == (
        "clients: rules that are for nobody: 4 problems\n"
        "  clients[0].match.ids: no client is called 'alcie'\n"
        "  clients[1].match.ids: no client is called 'x*'\n"
        "  clients[2].match: matches no client; they have 5 to 5 train rows\n"
        "  clients[3].match: matches no client; they have 5 to 5 train rows\n"
        "  hint: mend them or take them out; `pfl-lm validate` lists the clients and their rows"
    )


def test_a_rule_may_be_for_a_client_that_is_kept_for_later(tmp_path: Path) -> None:
    rules = [{"match": {"ids": ["bob"]}, "max_steps": 1}]
    check_recipe(tiny_recipe(tmp_path, clients=rules, **{"data.holdout_clients": ["bob"]}))


def test_modules_that_are_not_there_are_named_with_their_rule(tmp_path: Path) -> None:
    rules = [{"match": {"ids": ["bob"]}, "target_modules": ["o_proj", "qq_proj"]}]
    assert checked(tmp_path, clients=rules, **{"method.name": "local"}).startswith(
        "clients[0].target_modules: 'qq_proj' not in this backbone. It has: "
    )


def test_validate_says_who_differs_and_in_what(tmp_path: Path) -> None:
    rules = [{"match": {"ids": ["b*"]}, "max_steps": 9, "r": 2}]
    recipe = tiny_recipe(tmp_path, clients=rules, **{"method.name": "hetlora"})
    said = CliRunner().invoke(app, ["validate", str(recipe)]).stdout
    assert "    alice  5 / 1 / 2\n    bob    5 / 1 / 2  9 steps, r 2\n" in said


def test_a_comparison_refuses_methods_that_cannot_mix_ranks(tmp_path: Path) -> None:
    text = (
        f"{LOCAL}clients:\n  - {{{MATCH}, r: 4}}\n"
        "compare:\n  methods: [hetlora, flexlora, fedavg]\n  rates: [0.1]\n"
    )
    with pytest.raises(RecipeError) as caught:
        contenders(read_draft(write(tmp_path, text)))
    [_, line] = caught.value.message.splitlines()
    assert "compare.methods[2] (fedavg): clients[0].r: fedavg needs adapters of one shape" in line
    text = text.replace(", fedavg]", "]")
    labels = [each.label for each in contenders(read_draft(write(tmp_path, text)))]
    assert labels == ["hetlora", "flexlora", "local"]


def test_a_comparison_chooses_the_rates_of_all_clients(tmp_path: Path) -> None:
    text = (
        f"{LOCAL}clients:\n  - {{{MATCH}, learning_rate: 0.3}}\n"
        "compare:\n  methods: [fedavg]\n  rates: [0.1, 0.2]\n"
    )
    with pytest.raises(RecipeError) as caught:
        contenders(read_draft(write(tmp_path, text)))
    [_, line] = caught.value.message.splitlines()
    assert line == (
        "  line 8  clients[0].learning_rate: a comparison gives each method the rate that is best "
        "for it, and these clients would not get it; leave this out, or `compare`"
    )
    assert (
        contenders(read_draft(write(tmp_path, text.replace("methods: [fedavg]", "seeds: [1]"))))
        == ()
    )


def test_differences_between_rules_are_told_one_by_one(tmp_path: Path) -> None:
    def recipe(*rules: dict[str, object]) -> Recipe:
        data = json.dumps(list(rules))
        return load(tmp_path, f"clients={data}").recipe

    bob = {"match": {"ids": ["bob"]}, "max_steps": 3}
    one, other = recipe(bob), recipe({**bob, "max_steps": 4}, {**bob, "max_length": 9})
    assert differences(one, other, frozenset()) == [
        "clients[0].max_steps: 4, and the run began with 3",
        "clients[1].match.ids: bob, and the run began with nothing (null)",
        "clients[1].max_length: 9, and the run began with nothing (null)",
        "clients[1].max_steps: 3, and the run began with nothing (null)",
    ]
    assert differences(one, one, frozenset()) == []

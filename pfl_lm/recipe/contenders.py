"""What a recipe's ``compare`` section asks for, method by method, each as a recipe of its own.

Two contenders of one comparison differ in nothing but method, optimizer and learning rate. What the
server does with uploads, its rule of aggregation and its noise, goes with all that send it any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pfl_lm.errors import RecipeError, listed
from pfl_lm.recipe.compared import AS_WRITTEN, ComparedMethod, CompareOptions, Label
from pfl_lm.recipe.draft import Draft
from pfl_lm.recipe.explain import explain
from pfl_lm.recipe.load import LoadedRecipe, place
from pfl_lm.recipe.scalars import show
from pfl_lm.recipe.schema import Recipe

LOCAL = "local"
BASE_LABEL = "base"
"""What the untouched backbone is called among the rows of a comparison."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One method of a comparison.

    Attributes:
        loaded: its recipe, with the first of its rates and the recipe's seed.
        rates: the learning rates to choose from, as they were given.
        added: whether it was not asked for: `local` always takes part.
    """

    label: str
    loaded: LoadedRecipe
    rates: tuple[float | str, ...]
    added: bool = False


def contenders(draft: Draft) -> tuple[Contender, ...]:
    """Return the methods that a recipe compares, `local` among them; none without the section.

    Raises:
        RecipeError: one cannot be run; every problem that is not one of the recipe's own.
    """
    section = draft.data.get("compare")
    compare, places = _readable(section if isinstance(section, dict) else {})
    methods = list(compare.methods)
    if not methods:
        return ()
    if all(_section(each, draft).get("name") != LOCAL for each in methods):
        methods.append(ComparedMethod(method={"name": LOCAL}))
    own = _problems(draft.data, draft)
    found: list[Contender] = []
    problems = list(_own_rates(draft))
    for i, method in enumerate(methods):
        added = i >= len(compare.methods)
        made = _contender(method, compare, draft)
        if isinstance(made, Contender):
            wrong = list(_label_problems(made.label, found))
            found.append(replace(made, added=added))
        else:
            wrong = [each for each in made if each not in own]
        origin = f"{LOCAL} (added)" if added else _origin(places[i], method, draft)
        problems += [f"{origin}: {each}" for each in wrong]
    if problems:
        raise RecipeError(listed(str(draft.path), problems))
    return tuple(found)


def _own_rates(draft: Draft) -> Iterator[str]:
    """Say which rules give clients a rate that no method's choice of rates would reach."""
    rules = draft.data.get("clients")
    for i, rule in enumerate(rules if isinstance(rules, list) else ()):
        if isinstance(rule, dict) and rule.get("learning_rate") is not None:
            line = draft.line_of(("clients", i, "learning_rate"))
            yield (
                f"line {line}  clients[{i}].learning_rate: a comparison gives each method the rate "
                "that is best for it, and these clients would not get it; leave this out, or "
                "`compare`"
            )


def _readable(section: dict[str, Any]) -> tuple[CompareOptions, list[int]]:
    """Return what can be understood of a section, and the place of each of its methods.

    What cannot is among the recipe's own problems.
    """
    given = section.get("methods")
    places = list(range(len(given) if isinstance(given, list) else 0))
    kept = dict(section)
    while True:
        try:
            return CompareOptions.model_validate(kept), places
        except ValidationError as error:
            wrong = [details["loc"] for details in error.errors(include_url=False)]
        bad = {at[1] for at in wrong if at[0] == "methods" and len(at) > 1}
        for key in {str(at[0]) for at in wrong if len(at) == 1 or at[0] != "methods"}:
            del kept[key]
        if bad and "methods" in kept:
            kept["methods"] = [each for i, each in enumerate(kept["methods"]) if i not in bad]
            places = [place for i, place in enumerate(places) if i not in bad]


def _contender(
    method: ComparedMethod, compare: CompareOptions, draft: Draft
) -> Contender | list[str]:
    """Return one contender, or all that is wrong with it."""
    data = _data(method, draft)
    training = data["training"] if isinstance(data.get("training"), dict) else {}
    rates: list[Any] = method.training.learning_rates or compare.rates
    asked = method.training.optimizer or training.get("optimizer")
    problems: list[str] = []
    if not rates:
        rates = [training.get("learning_rate")]
        tries = (_with(data, optimizer=each) for each in (asked, method.training.optimizer))
        chosen = next((recipe for each in tries if (recipe := _valid(each))), None)
        if chosen is not None and chosen.training.optimizer != _recipes_optimizer(draft):
            problems.append(
                f"needs learning rates: training.learning_rate, {show(rates[0])}, is for "
                f"{_recipes_optimizer(draft)} and this is {chosen.training.optimizer}; add "
                "@RATE/RATE to it, or give compare.rates (--rates)"
            )
            return problems
    for optimizer in dict.fromkeys((asked, method.training.optimizer)):
        tried = [_with(data, optimizer=optimizer, learning_rate=rate) for rate in rates]
        problems = list(dict.fromkeys(p for each in tried for p in _problems(each, draft)))
        if not problems:
            recipe = Recipe.model_validate(tried[0])
            loaded = place(recipe, replace(draft, data=tried[0]))
            return Contender(method.label_for(recipe.method.name), loaded, tuple(rates))
    return problems


def _data(method: ComparedMethod, draft: Draft) -> dict[str, Any]:
    """Return the recipe's data with this method's section in it, and no comparison."""
    section = _section(method, draft)
    data = {key: value for key, value in draft.data.items() if key != "compare"}
    if section.get("name") == LOCAL:  # it sends nothing that could be averaged or protected
        data.pop("aggregation", None)
        if isinstance(privacy := data.get("privacy"), dict):
            data["privacy"] = {k: v for k, v in privacy.items() if k != "client_level"}
    return {**data, "method": section}


def _section(method: ComparedMethod, draft: Draft) -> dict[str, Any]:
    if method.name != AS_WRITTEN:
        return dict(method.method)
    written = draft.data.get("method")
    return {**(written if isinstance(written, dict) else {}), **method.method, **_named(written)}


def _named(written: object) -> dict[str, Any]:
    return {"name": written.get("name")} if isinstance(written, dict) else {}


def _with(data: dict[str, Any], **changes: object) -> dict[str, Any]:
    """Return data with other training options; None takes one out."""
    training = data.get("training")
    if not isinstance(training, dict):
        return data
    changed = {k: v for k, v in {**training, **changes}.items() if v is not None}
    return {**data, "training": changed}


def _recipes_optimizer(draft: Draft) -> str | None:
    recipe = _valid({key: value for key, value in draft.data.items() if key != "compare"})
    return None if recipe is None else recipe.training.optimizer


def _valid(data: dict[str, Any]) -> Recipe | None:
    try:
        return Recipe.model_validate(data)
    except ValidationError:
        return None


def _problems(data: dict[str, Any], draft: Draft) -> list[str]:
    """Return what is wrong with a recipe's data, without saying where it was written."""
    try:
        Recipe.model_validate(data)
    except ValidationError as error:
        return explain(error, replace(draft, data=data, lines={}, overrides=()))
    return []


def _label_problems(label: str, before: list[Contender]) -> Iterator[str]:
    try:
        TypeAdapter(Label).validate_python(label)
    except ValidationError as error:
        yield f"its label {error.errors()[0]['msg']}; give it one, as in short={label[:8]}…"
    if label.lower() == BASE_LABEL:
        yield f"label `{label}`: the untouched backbone is called that"
    if any(label.lower() == other.label.lower() for other in before):
        yield f"label `{label}`: another method has it; give one of them another label"


def _origin(i: int, method: ComparedMethod, draft: Draft) -> str:
    """Return where a method was asked for: in an override, or on a line of the file."""
    at = ("compare", "methods", i)
    name = f"compare.methods[{i}] ({method.label or method.name})"
    if override := draft.override_of(at):
        return f"{override.said}: {name}"
    return f"line {draft.line_of(at)}  {name}"

"""``clients``: what is otherwise for some of them. Rules, by id or by rows; torch-free.

    clients:
      - {match: {ids: [alice, "lab-*"]}, max_steps: 8, r: 4}
      - {match: {max_train_rows: 50}, local_epochs: 1, learning_rate: 0.001}

A client goes by the recipe's other sections, and then by each rule that it matches, in their order:
where two set the same key, the later one stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import translate
from functools import lru_cache
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator
from pydantic_core import PydanticCustomError

from pfl_lm.errors import RecipeError, listed
from pfl_lm.recipe.kinds import ModuleName, Text, module_names
from pfl_lm.recipe.options import MOST, Options, broken
from pfl_lm.recipe.scalars import brief, show
from pfl_lm.recipe.sections import TrainingOptions

MOST_RULES = 1000
_KEYS = ("max_steps", "local_epochs", "learning_rate", "max_length", "r", "target_modules")
OF_THE_ADAPTER = ("r", "target_modules")
"""Keys that make clients' adapters differ in shape."""


def _is_named(client: str, names: tuple[str, ...]) -> bool:
    return client in names or _pattern(names).fullmatch(client) is not None


@lru_cache(maxsize=MOST_RULES)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Return what any of the names matches, wildcards and all; letters' case matters."""
    return re.compile("|".join(map(translate, names)))


class ClientMatch(Options):
    """Which clients a rule is for: all that is said must hold of a client."""

    ids: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None,
        description="Their ids; `*`, `?` and `[…]` stand for other letters, as in names of files.",
        examples=["[alice]"],
    )
    min_train_rows: int | None = Field(
        default=None,
        ge=0,
        le=MOST,
        description="Clients with at least so many train rows, without those held out for "
        "validation, as `pfl-lm validate` lists them.",
    )
    max_train_rows: int | None = Field(
        default=None, ge=0, le=MOST, description="Clients with at most so many train rows."
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        least, most = self.min_train_rows, self.max_train_rows
        if self.ids is None and least is None and most is None:
            raise broken("says of no client that it is meant: give `ids`, or a number of rows")
        if least is not None and most is not None and least > most:
            raise broken(
                f"must be at least `min_train_rows` ({least}), got {most}", "max_train_rows"
            )
        return self

    def holds(self, client: str, n_rows: int) -> bool:
        """Return whether a client with so many train rows is meant."""
        named = self.ids is None or _is_named(client, tuple(self.ids))
        enough = self.min_train_rows is None or n_rows >= self.min_train_rows
        return named and enough and (self.max_train_rows is None or n_rows <= self.max_train_rows)


class ClientRule(Options):
    """What is otherwise for the clients that it matches; see [clients that differ](clients.md).

    Of two rules that set the same key for a client, the later one stands.
    """

    match: ClientMatch = Field(
        description="Which clients it is for.", examples=[{"ids": "[alice]"}]
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="In place of `training.max_steps` or `local_epochs`; this or `local_epochs`.",
    )
    local_epochs: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="In place of `training.local_epochs` or `max_steps`.",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, le=1e38, description="In place of `training.learning_rate`; a number."
    )
    max_length: int | None = Field(
        default=None, ge=8, le=1_000_000, description="In place of `data.max_length`."
    )
    r: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="In place of `adapter.r`; the scale lora_alpha / r stays the recipe's. With "
        "local, flexlora and hetlora.",
    )
    target_modules: Annotated[list[ModuleName], AfterValidator(module_names)] | None = Field(
        default=None,
        description="In place of `adapter.target_modules`. With local, flexlora and hetlora.",
    )

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.max_steps is not None and self.local_epochs is not None:
            raise broken("needs at most one of `max_steps` and `local_epochs`; both are given")
        if not self.changes():
            raise broken(f"changes nothing; it may set {', '.join(_KEYS)}")
        return self

    def changes(self) -> dict[str, object]:
        """Return what it sets; how long a turn is, is one thing said in one of two ways."""
        found = {key: value for key in _KEYS if (value := getattr(self, key)) is not None}
        if {"max_steps", "local_epochs"} & found.keys():
            found = {"max_steps": None, "local_epochs": None, **found}
        return found


def _only_what_is_set(rules: Sequence[ClientRule]) -> list[dict[str, object]]:
    return [rule.model_dump(mode="python", exclude_none=True) for rule in rules]


def _mapping(given: object) -> object:
    if not isinstance(given, dict | ClientRule):
        raise broken(
            "must be a rule such as `{match: {ids: [alice]}, max_steps: 8}`, got " + show(given)
        )
    return given


ClientRules = Annotated[
    list[Annotated[ClientRule, BeforeValidator(_mapping, json_schema_input_type=ClientRule)]],
    Field(max_length=MOST_RULES),
    PlainSerializer(_only_what_is_set, when_used="always"),
]


def misfit(
    rules: Sequence[ClientRule],
    training: TrainingOptions,
    method: str,
    mixing: Sequence[str],
    *,
    diagnostics: bool,
) -> PydanticCustomError | None:
    """Return what of the rules cannot go with the rest of a recipe; None if all can.

    ``mixing`` are the methods whose clients' adapters may differ in shape.
    """
    *first, last = mixing
    for i, rule in enumerate(rules):
        if rule.learning_rate is not None and training.rate_is_auto:
            return broken(
                "`training.learning_rate: auto` chooses one rate for all clients and halves it for "
                "all; give a number there, or leave this one out",
                *("clients", i, "learning_rate"),
            )
        for key in OF_THE_ADAPTER:
            if getattr(rule, key) is None:
                continue
            if method not in mixing:
                return broken(
                    f"{method} needs adapters of one shape: the zeros that a smaller one would be "
                    f"filled up with are no opinion, and would count as one; use "
                    f"{', '.join(first)} or {last}, or leave it out",
                    *("clients", i, key),
                )
            if diagnostics:
                return broken(
                    "true compares clients layer by layer, for which their adapters need one "
                    f"shape; leave it out, or `clients[{i}].{key}`",
                    *("runtime", "diagnostics"),
                )
    return None


def refuse_idle_rules(rules: Sequence[ClientRule], n_rows: Mapping[str, int]) -> None:
    """Make sure that every rule, and every id without wildcards, is some client's.

    ``n_rows`` are the train rows of all clients, those kept for later among them.

    Raises:
        RecipeError: a rule matches no client; all such rules and ids are named.
    """
    if problems := list(_idle(rules, n_rows)):
        raise RecipeError(
            listed("clients: rules that are for nobody", problems),
            hint="mend them or take them out; `pfl-lm validate` lists the clients and their rows",
        )


def _idle(rules: Sequence[ClientRule], n_rows: Mapping[str, int]) -> Iterator[str]:
    for i, rule in enumerate(rules):
        strangers = [
            name
            for name in rule.match.ids or ()
            if name not in n_rows and not any(map(_pattern((name,)).fullmatch, n_rows))
        ]
        if strangers:
            yield f"clients[{i}].match.ids: no client is called {_few(strangers)}"
        elif not any(rule.match.holds(client, n) for client, n in n_rows.items()):
            fewest, most = min(n_rows.values()), max(n_rows.values())
            yield (
                f"clients[{i}].match: matches no client; they have {fewest} to {most} train rows"
            )


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(brief(repr(name)) for name in names[:5]) + more

"""``compare``: which methods `pfl-lm compare` sets against each other, with which seeds and rates.

A method may be written as one text, the same as on the command line:

    [LABEL=]METHOD[:PRESET][:OPTIMIZER][:OPTION=VALUE]…[@RATE/RATE…]

    fedavg    fedavg:sgd@0.5/1/2    pflalign:half_correction    mine=pflalign:beta=0.8:eps=1e-12

METHOD `recipe` stands for the recipe's own method with the options and the optimizer it has there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from pfl_lm.recipe.kinds import Rate, fits
from pfl_lm.recipe.methods import METHOD_OPTIONS
from pfl_lm.recipe.nearest import nearest
from pfl_lm.recipe.options import Options, broken
from pfl_lm.recipe.scalars import brief, resolve_plain, show
from pfl_lm.recipe.sections import TrainingOptions
from pfl_lm.recipe.yaml12 import parse_scalar_or_flow

Optimizer = Literal["sgd", "adamw"]
OPTIMIZERS = get_args(Optimizer)
AS_WRITTEN = "recipe"
"""The name that stands for the method of the recipe itself."""


def _each_once(items: list[Any]) -> list[Any]:
    before: set[Any] = set()
    for i, item in enumerate(items):
        if item in before:
            raise broken(f"{show(item)} is there twice", i)
        before.add(item)
    return items


Rates = Annotated[list[Rate], Field(max_length=32), AfterValidator(_each_once)]
Label = Annotated[
    str,
    fits(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}",
        "1 to 32 letters, digits, `.`, `_` or `-`, the first a letter or a digit",
    ),
]


class ComparedTraining(Options):
    """What of training may differ between methods; everything else is the recipe's, for all."""

    optimizer: Optimizer | None = Field(
        default=None,
        description="Not set: the recipe's, if the method takes it, else the method's own.",
    )
    learning_rates: Rates = Field(
        default=[], description="Rates to choose from by validation; not set: `compare.rates`."
    )


class ComparedMethod(Options):
    """One method of a comparison. As text: `[LABEL=]METHOD[:PRESET][:OPTION=VALUE]…[@RATE/RATE…]`.

    A part may also be an optimizer, and METHOD may be `recipe`, the recipe's own method as it is.
    """

    label: Label | None = Field(
        default=None,
        description="What tables and folders call it; not set: the method and how it is changed.",
    )
    method: dict[str, Any] = Field(
        description="As the recipe's section `method`; `name: recipe` starts from that very "
        "section.",
        examples=[{"name": "fedavg"}],
    )
    training: ComparedTraining = Field(
        default_factory=ComparedTraining,
        description="Its optimizer and its learning rates.",
        examples=[{"optimizer": "sgd"}],
    )

    @property
    def name(self) -> str:
        """The method's name; ``recipe`` for the recipe's own."""
        return str(self.method.get("name"))

    def label_for(self, name: str) -> str:
        """Return its label, or one made of the method's name and of all that is changed."""
        if self.label is not None:
            return self.label
        options = {key: value for key, value in self.method.items() if key != "name"}
        parts = [name, *([AS_WRITTEN] if self.name == AS_WRITTEN else ())]
        for key, value in options.items():
            said = str(value).lower() if isinstance(value, bool) else str(value)
            parts.append(said if key == "preset" else f"{key}-{said}")
        parts += [self.training.optimizer] if self.training.optimizer else []
        return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts))


class CompareOptions(Options):
    """What `pfl-lm compare` compares; a run of its own, `pfl-lm finetune`, passes it over."""

    methods: list[
        Annotated[
            ComparedMethod,
            BeforeValidator(
                lambda given: _from_text(given) if isinstance(given, str) else _mapping(given),
                json_schema_input_type=str | ComparedMethod,
            ),
        ]
    ] = Field(
        default=[],
        max_length=64,
        description="The methods: texts such as `fedavg:sgd@0.5/1`, or mappings. `local` is added "
        "if it is not among them.",
        examples=["[pflalign, fedavg]"],
    )
    seeds: Annotated[
        list[Annotated[int, Field(ge=0, le=2**63 - 1)]], AfterValidator(_each_once)
    ] = Field(
        default=[],
        max_length=100,
        description="Seeds, each a run of every method; the first one's runs choose the rates. "
        "Not set: the recipe's.",
    )
    rates: Rates = Field(
        default=[],
        description="Learning rates to choose from, for methods without their own. Not set: the "
        "recipe's, for methods with its optimizer.",
    )


def _mapping(given: object) -> object:
    if not isinstance(given, dict | ComparedMethod):
        raise broken(f"must be a method such as `fedavg:sgd`, or a mapping, got {show(given)}")
    return given


def _from_text(text: str) -> dict[str, Any]:
    """Return the mapping that a text is short for."""
    head, at, rates = text.partition("@")
    first, *parts = head.split(":")
    label, equals, name = first.rpartition("=")
    if name not in METHOD_OPTIONS and name != AS_WRITTEN:
        raise broken(f"{_no_method(name)}, in {show(text)}")
    method: dict[str, Any] = {"name": name}
    training: dict[str, Any] = {}
    for part in parts:
        key, value = _part(part, name)
        place = training if key == "optimizer" else method
        if key in place:
            raise broken(f"`{brief(key)}` is there twice, in {show(text)}")
        place[key] = value
    if at:
        training["learning_rates"] = list(read_list(rates, "/"))
    return {"method": method, "training": training, **({"label": label} if equals else {})}


def read_list(text: str, separator: str = ",") -> Iterable[Any]:
    """Yield the values of a list that was typed without brackets, by the rules of YAML."""
    for item in text.split(separator):
        try:
            yield resolve_plain(item.strip())
        except ValueError:
            yield item


def _part(part: str, name: str) -> tuple[str, Any]:
    """Return the key and value that one part of a text sets."""
    key, equals, value = part.partition("=")
    if equals:
        options = METHOD_OPTIONS.get(name)
        known = key == "optimizer" or (options is not None and key in options.model_fields)
        if key in TrainingOptions.model_fields and not known:
            raise broken(f"`{key}` is the same for all methods: set `training.{key}`")
        try:
            return key, parse_scalar_or_flow(value)
        except ValueError as error:
            raise broken(f"{show(part)}: {error}") from None
    presets = presets_of(name)
    if part in OPTIMIZERS and part in presets:
        raise broken(
            f"`{part}` is an optimizer and a preset of {name}; write `optimizer={part}` or "
            f"`preset={part}`"
        )
    if part in OPTIMIZERS:
        return "optimizer", part
    if part in presets or name == AS_WRITTEN:
        return "preset", part
    meant = nearest(part, (*presets, *OPTIMIZERS), cutoff=0.4)
    advice = f". Did you mean `{meant}`?" if meant else ""
    owns = f"no preset of {name} ({', '.join(presets)})" if presets else f"{name} has no presets"
    raise broken(
        f"{show(part)}: {owns}, and no optimizer ({', '.join(OPTIMIZERS)}); an option is written "
        f"as key=value{advice}"
    )


def presets_of(name: str) -> tuple[str, ...]:
    """Return the named settings of a method."""
    options = METHOD_OPTIONS.get(name)
    field = options.model_fields.get("preset") if options else None
    found = (get_args(choice) for choice in get_args(field.annotation)) if field else ()
    return cast("tuple[str, ...]", tuple(each for choices in found for each in choices))


def _no_method(name: str) -> str:
    meant = nearest(name, METHOD_OPTIONS)
    advice = f"Did you mean `{meant}`? " if meant else ""
    there = ", ".join((*METHOD_OPTIONS, AS_WRITTEN))
    return f"there is no method {show(name)}. {advice}There are {there}"

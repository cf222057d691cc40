"""Kinds of values that several sections of a recipe have: names, paths within packages, rates."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from pfl_lm.recipe.options import broken
from pfl_lm.recipe.scalars import brief, show

_NOT_ADAPTED = ("embed_tokens", "lm_head")


def fits(pattern: str, said: str) -> AfterValidator:
    """Return a validator for text that must match ``pattern``; ``said`` tells a person the rule."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise broken(f"must be {said}, got {show(text)}")
        return text

    return AfterValidator(check)


def _auto_or_number(value: object, number: ValidatorFunctionWrapHandler) -> object:
    return value if value == "auto" else number(value)


_Rate = Annotated[float, Field(gt=0, le=1e38)]  # what float32 holds
_OR_AUTO = WrapValidator(_auto_or_number, json_schema_input_type=_Rate | Literal["auto"])
_AS_IT_IS = PlainSerializer(lambda value: value, return_type=Any)
Rate = Annotated[_Rate, _OR_AUTO, _AS_IT_IS]


def whole_as_int(number: float) -> float:
    """Return a number as an int if it is one."""
    return int(number) if number.is_integer() else number


def unique(items: list[int] | None) -> list[int] | None:
    """Return layers, of which none may be named twice."""
    if items is not None and len(set(items)) < len(items):
        raise broken("each layer may be named once only")
    return items


def module_names(names: list[str]) -> list[str]:
    """Return modules that an adapter may be put beside; each once, and none of the vocabulary."""
    if not names:
        raise broken("must name at least one module, for example `[q_proj, v_proj]`")
    before: set[str] = set()
    for i, name in enumerate(names):
        if name in before:
            raise broken(f"`{brief(name)}` is there twice", i)
        before.add(name)
        if name.rpartition(".")[2] in _NOT_ADAPTED:
            raise broken(
                f"`{brief(name)}` cannot be adapted: it would make every client's adapter as large "
                "as the vocabulary, and serving engines do not take it",
                i,
            )
    return names


def _within(text: str, what: str) -> str:
    windows = PureWindowsPath(text)
    parts = PurePosixPath(text).parts
    if "\\" in text or windows.drive or text.startswith(("/", "~")) or ".." in parts or not parts:
        raise broken(f"must be the name of a {what} inside the package, got {show(text)}")
    return text


def file_within(text: str) -> str:
    """Return the name of a file inside a package, if it can be one."""
    return _within(text, "file")


def folder_within(text: str) -> str:
    """Return the name of a folder inside a package, if it can be one."""
    return _within(text, "folder")


RunName = Annotated[
    str,
    fits(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}",
        "1 to 80 letters, digits, `.`, `_` or `-`, the first a letter or a digit",
    ),
]
Text = Annotated[str, Field(min_length=1)]
ModuleName = Annotated[str, fits(r"[\w-]+(\.[\w-]+)*", "a module name such as q_proj")]
PackageName = Annotated[str, fits(r"[A-Za-z_][\w-]*", "the name of an installed package")]
HubId = Annotated[str, fits(r"[\w.-]+(/[\w.-]+)?", "a Hub id such as ORG/NAME")]

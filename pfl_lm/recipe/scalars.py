"""What a plain scalar means by the YAML 1.2 core schema, and how a value is shown to a person."""

from __future__ import annotations

import re

Scalar = str | int | float | bool | None
Value = Scalar | list["Value"] | dict[str, "Value"]

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MAX_DIGITS = 400
_SHOWN = 60


def resolve_plain(text: str) -> Scalar:
    """Return what an unquoted scalar stands for: ``1e-4`` is a number, ``yes`` is text.

    Raises:
        ValueError: a number of more than 400 digits.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        if len(text) > _MAX_DIGITS:
            raise ValueError(f"a number of {len(text)} digits")
        if text[:2] in ("0o", "0x"):
            return int(text[2:], base=8 if text[1] == "o" else 16)
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if special := _SPECIAL.fullmatch(text):
        return float("nan") if special[3] else float(f"{special[1]}inf")
    return text


def show(value: object) -> str:
    """Return a value as a person would name it, short and on one line."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return brief(repr(value))


def brief(text: str, longest: int = _SHOWN) -> str:
    """Return text of others for a message: its end left out where it is long."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."

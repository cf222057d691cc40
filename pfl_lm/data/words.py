"""How values and names of the data are put in a message: quoted, escaped, and never long."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from itertools import islice

_NAMES_SHOWN = 12
_LONGEST_GUESSED, _MOST_GUESSED = 100, 1000
"""Beyond these nobody mistyped a name, and comparing it with all others would take long."""


def did_you_mean(name: str, known: Mapping[str, str]) -> str:
    """Return a suggestion to append; ``known`` maps what people write to what they should."""
    if len(name) > _LONGEST_GUESSED:
        return ""
    known = dict(islice(known.items(), _MOST_GUESSED))
    meant = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f". Did you mean {known[meant[0]]!r}?" if meant else ""


def encodable(text: str) -> bool:
    """Say whether UTF-8 can write the text: half a surrogate pair it cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: object) -> str:
    """Return what a value is, as its file would call it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {short(value)}"
    if isinstance(value, str):
        return f"the string {short(value)}"
    if isinstance(value, list):
        return "an array"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def short(value: object) -> str:
    """Return the value quoted and escaped, its end left out where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def quoted(names: Iterable[str]) -> str:
    """Return the first few names, quoted and escaped, and the number of the rest."""
    said = [short(name) for name in names]
    rest = len(said) - _NAMES_SHOWN
    return ", ".join(said[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

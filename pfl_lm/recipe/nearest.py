"""Which of some words a word is most like."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: object, among: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the word that ``word`` is most like, if any is like it at all."""
    known = {each.lower(): each for each in among}
    found = difflib.get_close_matches(str(word).lower().replace("-", "_"), known, 1, cutoff)
    return known[found[0]] if found else None

"""Client ids as folder names: short, plain, and never twice the same.

An id is anything a data file may hold: ``../x``, ``Ünï``, two that differ only in case. A slug is
``[a-z0-9-]``, at most 80 characters, and differs from every other even on a file system that
ignores case. Where two ids would share one, each gets a few digits of its own hash.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

_LONGEST = 80
_RESERVED = {"con", "prn", "aux", "nul", *(f"{n}{i}" for n in ("com", "lpt") for i in range(10))}


def slugs(client_ids: Iterable[str]) -> dict[str, str]:
    """Return a slug for each id; the same ids give the same slugs in any order."""
    plain = {client: _plain(client) for client in sorted(client_ids)}
    uses = Counter(plain.values())
    taken: dict[str, str] = {}
    for client, slug in plain.items():
        ambiguous = not slug or uses[slug] > 1 or slug in _RESERVED
        taken[client] = _with_digest(slug, client, 8) if ambiguous else slug
    if len(set(taken.values())) < len(taken):  # an id that looks like another's slug with its hash
        taken = {client: _with_digest(slug, client, 32) for client, slug in plain.items()}
    return taken


def slug_beside(client: str, taken: Iterable[str]) -> str:
    """Return a slug for an id that comes late, unlike those that are taken already."""
    others = set(taken)
    plain = _plain(client)
    choices = (plain, *(_with_digest(plain, client, digits) for digits in (8, 32)))
    return next(s for s in choices if s and s not in others and s not in _RESERVED)


def _plain(client: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", client).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:_LONGEST].strip("-")


def _with_digest(slug: str, client: str, digits: int) -> str:
    digest = hashlib.blake2b(client.encode(), digest_size=16).hexdigest()[:digits]
    return f"{slug[: _LONGEST - digits - 1] or 'client'}-{digest}"

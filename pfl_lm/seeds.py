"""Seeds derived by hashing, so that no two purposes share one and no order of events matters."""

from __future__ import annotations

import hashlib


def derive_seed(base: int, *path: int | str) -> int:
    """Return a 63-bit seed for one purpose, for example ``derive_seed(7, "batches", "alice", 3)``.

    The same arguments give the same seed in every process and on every machine; ``PYTHONHASHSEED``
    plays no part.
    """
    digest = hashlib.blake2b(repr((base, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

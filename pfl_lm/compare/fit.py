"""Whether runs can stand side by side: the same rows, backbone and recipe, but for the method.

Cells may come from several machines, so nothing is believed because of a folder's name: a cell's
recipe is compared with the one it should have, key by key, and its rows and backbone by digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

from pfl_lm.compare.cells import Cell
from pfl_lm.compare.plan import Plan
from pfl_lm.federation.history import Member
from pfl_lm.recipe import Recipe
from pfl_lm.resume import HARMLESS, differences

PLACES = frozenset(f"backbone.{key}" for key in ("model_name_or_path", "package", "gguf_file"))
"""Where a backbone is found differs between machines; its fingerprint must not."""

APART = ("name", "seed", "method", "aggregation", "runtime", "backbone")
"""What of a recipe is no part of the digest: it differs, or something else stands for it."""


def digest(recipe: Recipe, rows: Mapping[str, str], fingerprint: str) -> str:
    """Return what all trials of a comparison have in common, as SHA-256.

    Args:
        recipe: of any of them; method, rate, optimizer, seed and places are left out.
        rows: a digest of each client's rows and splits.
        fingerprint: of the backbone's weights, its precision among them.
    """
    shared = {key: value for key, value in recipe.run_options().items() if key not in APART}
    shared["data"].pop("path")
    shared["federation"].pop("min_clients")
    shared["privacy"].pop("client_level")  # which `local` goes without, as without a rule
    for key in ("learning_rate", "optimizer"):
        shared["training"].pop(key)
    content = {"recipe": shared, "rows": dict(sorted(rows.items())), "backbone": fingerprint}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def misfits(cell: Cell, plan: Plan, stored: Recipe, members: list[Member]) -> Iterator[str]:
    """Yield every reason why what was run in a cell's folder is not that cell."""
    may_differ = (HARMLESS | PLACES) - {"federation.rounds"}
    for line in differences(stored, cell.loaded.recipe, may_differ):
        yield line.replace("and the run began with", "and it was run with")
    theirs = {member.client: member.rows_sha256 for member in members}
    strangers = sorted(theirs.keys() ^ plan.clients.keys())
    if strangers:
        yield f"its clients are others: {', '.join(map(repr, strangers[:3]))}"
    changed = [
        client
        for client, rows in plan.clients.items()
        if client in theirs and theirs[client] != rows.sha256
    ]
    if changed:
        yield f"other rows of {', '.join(map(repr, changed[:3]))}"

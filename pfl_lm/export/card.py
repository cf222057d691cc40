"""``README.md`` of an exported adapter: what it is, for whom, how good, and what to beware of.

The same run gives the same bytes: no date, no timing, no path. Counts stand in for data, and a
client's id is the only word of the data's that a card repeats. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pfl_lm.export.card_sections import (
    CANDIDATES,
    ClientFacts,
    RunFacts,
    base_name,
    choice_paragraph,
    limits,
    lineage,
    n_clients,
    score_table,
    versions_and_recipe,
)
from pfl_lm.export.card_text import (
    Place,
    front_matter,
    load_section,
    number,
    safe,
    table,
    unit,
)
from pfl_lm.export.index import BASE
from pfl_lm.privacy.spent import NO_LEVER, ClientSpent

_SEEN_FROM = "  # as seen from the run folder"


def client_card(run: RunFacts, facts: ClientFacts) -> str:
    """Return the card of one client's adapter."""
    who = safe(facts.client)
    what = (
        f"A LoRA adapter that makes {base_name(run.base)} the personal model of one client, {who}: "
        f"fine-tuned with {run.recipe.method.name} in a federation of {n_clients(run)}.\n"
    )
    if facts.choice.candidate == BASE:
        what += (
            "\n**This client keeps the backbone**, because no candidate beat it on the client's "
            "validation rows. The adapter here changes nothing: its B factors are zero, and the "
            "model answers as the backbone does.\n"
        )
    return _card(
        run,
        title=f"Adapter of client {who}",
        what=what,
        place=Place(f"adapters/{facts.slug}", remark=_SEEN_FROM),
        made=lineage(run, facts),
        scores=f"{score_table(facts)}\n{choice_paragraph(facts)}",
        limited=limits(run, facts.spent, shared=False, uploads=facts.bytes_up > 0),
    )


def global_card(
    run: RunFacts,
    scores: Mapping[str, Mapping[str, Mapping[str, float]]],
    spent: ClientSpent = NO_LEVER,
) -> str:
    """Return the card of the shared adapter; ``scores`` by client, split and candidate.

    ``spent`` is the most of any client.
    """
    what = (
        f"The LoRA adapter for {base_name(run.base)} that {n_clients(run)} share, fine-tuned with "
        f"{run.recipe.method.name}: a start for a client that did not take part. Each client that "
        "did has its own adapter.\n"
    )
    return _card(
        run,
        title=f"Shared adapter of {safe(run.recipe.name)}",
        what=what,
        place=Place("global", remark=_SEEN_FROM),
        made=lineage(run, None),
        scores=_mean_and_worst(scores, unit(run.base)),
        limited=limits(run, spent, shared=True, uploads=True),
    )


def _mean_and_worst(scores: Mapping[str, Mapping[str, Mapping[str, float]]], unit: str) -> str:
    split = "test" if all("test" in of_client for of_client in scores.values()) else "validation"
    rows = []
    for name in (BASE, "global"):
        losses = [of_client[split][name] for of_client in scores.values()]
        mean = math.fsum(losses) / len(losses)
        rows.append((name, CANDIDATES[name], number(mean), number(max(losses))))
    return (
        f"Loss on the clients' own {split} rows, nats a {unit}, lower is better; every "
        "client counts the same.\n\n"
        + table(("model", "what it is", "mean", "worst client"), rows, right=(2, 3))
    )


def _card(
    run: RunFacts, *, title: str, what: str, place: Place, made: str, scores: str, limited: str
) -> str:
    return "\n".join(
        [
            front_matter(run.base),
            f"# {title}\n",
            what,
            f"## Use it\n\n{load_section(run.base, place)}",
            f"## How it was made\n\n{made}",
            f"## How good it is\n\n{scores}",
            f"## Limits\n\n{limited}",
            versions_and_recipe(run),
        ]
    )

"""``README.md`` of a repository of adapters: whose are in it, how good each is, how to load one."""

from __future__ import annotations

from pfl_lm.export.card_text import (
    Place,
    base_model,
    count,
    front_matter,
    load_section,
    number,
    safe,
    table,
    unit,
)
from pfl_lm.export.index import BASE, AdapterIndex, ClientEntry

_HEAD = ("client", "folder", "its model", "rows", "scored on", "base", "its own", "difference")


def repository_card(index: AdapterIndex, repo: str) -> str:
    """Return the index card of ``repo``, which holds the clients of ``index``."""
    base, run = base_model(index), index.run
    name = f"`{base.hub_id}`" if base.hub_id else "a base model that is not on the Hub"
    first = next(iter(index.clients.values()))
    rows = [_row(client, entry) for client, entry in index.clients.items()]
    return "\n".join(
        [
            front_matter(base),
            f"# {safe(run.name)}: one adapter per client\n",
            f"LoRA adapters for {name}, one for each of {count(len(rows), 'client')}, fine-tuned "
            f"together with {safe(run.method)} in {count(run.rounds, 'round')} of "
            f"{safe(run.turn)}. A client's folder has a card of its own.\n",
            "## Use one\n",
            load_section(base, Place(repo, subfolder=f"clients/{first.slug}")),
            "## Clients\n",
            "Loss on each client's own held-out rows, nats a "
            f"{unit(base)}, lower is better. "
            "Where its model is base, no candidate beat the untouched backbone, and the adapter "
            "changes nothing. Rows are those it was trained on.\n",
            table(_HEAD, rows, right=(3, 5, 6, 7)),
            "`adapters.json` says the same for programs, with every candidate's score.\n",
            "## Limits\n",
            "- **Federated is not private.** Adapter weights can memorize what they were trained "
            "on. Treat each adapter as you would treat its client's data.\n"
            "- The base model's licence and limits apply. Nothing here says under which licence "
            "the training data may be used.\n",
        ]
    )


def _row(client: str, entry: ClientEntry) -> tuple[str, ...]:
    split, scores = next(
        ((split, entry.scores[split]) for split in ("test", "validation") if split in entry.scores),
        ("", {}),
    )
    base, own = scores.get(BASE), scores.get(entry.candidate)
    difference = "" if base is None or own is None else f"{own - base:+.4f}"
    folder = f"[{entry.slug}](clients/{entry.slug})"
    losses = (number(base), number(own), difference)
    return (safe(client), folder, safe(entry.candidate), str(entry.rows.train), split, *losses)

"""What every client takes home: its adapter, which model it is, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pfl_lm.evaluate import Choice
from pfl_lm.export.folders import export_adapter
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.ledger import Ledger
from pfl_lm.files import write_atomically
from pfl_lm.methods import ServerState
from pfl_lm.model.backbone import Backbone

FORMAT = 1


@dataclass(frozen=True, slots=True)
class ClientResult:
    """What one client got out of a run.

    Attributes:
        choice: which candidate is its model, and why.
        scores: nats a supervised token, by split, then candidate, after the last round.
        sha256: of its ``adapter_model.safetensors``.
    """

    client: str
    slug: str
    choice: Choice
    scores: dict[str, dict[str, float]]
    sha256: str


def export_adapters(
    folder: Path, side: ClientSide, server: ServerState, backbone: Backbone, ledger: Ledger
) -> tuple[ClientResult, ...]:
    """Write ``adapters/<slug>/`` for every client, ``global/`` and ``adapters.json``.

    A client for whom the backbone won gets an adapter whose B is zero, so that everyone's loads the
    same way. ``global/`` is written for methods that have a global candidate.

    Raises:
        ExportError: an adapter does not read back as written.
        RunFolderError: the folder cannot be written.
    """
    scores = _final_scores(ledger)
    results = []
    shared = None
    for client, choice in ledger.choices().items():
        slug = side.store.slugs[client]
        candidates = side.candidates(
            client, side.method.broadcast(server, client), ledger.state_file(client)
        )
        vector = candidates[choice.candidate]
        sha256 = export_adapter(side.adapter, vector, backbone, folder / "adapters" / slug)
        results.append(ClientResult(client, slug, choice, scores[client], sha256))
        shared = candidates.get("global")
    if shared is not None:
        export_adapter(side.adapter, shared, backbone, folder / "global")
    _write_index(folder, results, backbone)
    return tuple(results)


def _final_scores(ledger: Ledger) -> dict[str, dict[str, dict[str, float]]]:
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for _, client, split, candidate, nll in ledger.scores():  # in the order of rounds
        scores.setdefault(client, {}).setdefault(split, {})[candidate] = nll
    return scores


def _write_index(folder: Path, results: list[ClientResult], backbone: Backbone) -> None:
    clients: Mapping[str, object] = {
        result.client: {
            "slug": result.slug,
            "candidate": result.choice.candidate,
            "reason": result.choice.reason,
            "scores": result.scores,
            "sha256": result.sha256,
        }
        for result in results
    }
    base = {
        "model_name_or_path": backbone.name,
        "revision": backbone.revision,
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }
    index = {"format": FORMAT, "base": base, "clients": clients}
    text = json.dumps(index, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    write_atomically(folder / "adapters.json", text.encode())

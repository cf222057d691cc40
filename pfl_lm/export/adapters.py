"""What every client takes home: its adapter, which model it is, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import cast

from pydantic import ValidationError

import pfl_lm
from pfl_lm.errors import ExportError, RunFolderError
from pfl_lm.evaluate import Choice
from pfl_lm.export.card import client_card, global_card
from pfl_lm.export.card_sections import ClientFacts, RunFacts
from pfl_lm.export.card_text import BaseModel, hub_id
from pfl_lm.export.folders import export_adapter
from pfl_lm.export.index import (
    NAME,
    AdapterIndex,
    BaseEntry,
    ClientEntry,
    Prompts,
    RowCounts,
    RunEntry,
    Split,
)
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.schema import DAMAGED
from pfl_lm.files import write_atomically
from pfl_lm.methods import ServerState
from pfl_lm.model.backbone import Backbone
from pfl_lm.privacy.spent import NO_LEVER, ClientSpent, largest, spent_by_client
from pfl_lm.recipe import Recipe

CARD = "README.md"


Metrics = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class ClientResult:
    """What one client got out of a run.

    Attributes:
        choice: which candidate is its model, and why.
        scores: nats a supervised token, by split, then candidate, after the last round.
        sha256: of its ``adapter_model.safetensors``.
        spent: what its data has spent of privacy, where the recipe has a lever for it.
        metrics: other numbers, by split, then candidate, then name.
    """

    client: str
    slug: str
    choice: Choice
    scores: dict[str, dict[str, float]]
    sha256: str
    spent: ClientSpent = NO_LEVER
    metrics: Metrics = field(default_factory=dict)


def export_adapters(
    folder: Path,
    recipe: Recipe,
    side: ClientSide,
    server: ServerState,
    backbone: Backbone,
    ledger: Ledger,
) -> tuple[ClientResult, ...]:
    """Write ``adapters/<slug>/`` for every client, ``global/`` and, last, ``adapters.json``.

    A client for whom the backbone won gets an adapter whose B is zero, so that everyone's loads the
    same way. ``global/`` is written for methods that have a global candidate, unless every client
    has a head of its own: then there is none for all. Each folder's card is its last file.

    Raises:
        ExportError: an adapter does not read back as written.
        RunFolderError: the folder cannot be written.
    """
    run = _run_facts(recipe, side, backbone)
    scores, metrics, traffic = _final_scores(ledger), _final_metrics(ledger), ledger.traffic()
    spent = spent_by_client(ledger.summaries(), recipe.privacy, side.dataset.client_ids)
    results = []
    for client, choice in ledger.choices().items():
        slug = side.store.slugs[client]
        candidates = side.candidates(
            client, side.method.broadcast(server, client), ledger.state_file(client)
        )
        if choice.candidate not in candidates:
            raise ExportError(f"{folder}: {client!r} was given {choice.candidate!r}, no model here")
        place = folder / "adapters" / slug
        sha256 = export_adapter(
            side.adapter,
            candidates[choice.candidate],
            backbone,
            place,
            layout=side.layout_of(client),
            options=side.own[client].adapter,
        )
        result = ClientResult(
            client,
            slug,
            choice,
            scores[client],
            sha256,
            spent[client],
            metrics.get(client, {}),
        )
        card = client_card(run, _client_facts(result, side, traffic.get(client, (0, 0, 0))))
        write_atomically(place / CARD, card.encode())
        results.append(result)
    shared = None if side.private_head else side.shared(server)
    if shared is not None:
        export_adapter(side.adapter, shared, backbone, folder / "global")
        write_atomically(
            folder / "global" / CARD, global_card(run, scores, largest(spent)).encode()
        )
    try:
        index = _index(recipe, results, side, backbone)
    except ValidationError:  # names of splits, candidates or reasons that nobody here has given
        raise RunFolderError(
            f"{folder}: its ledger has scores or choices that pfl-lm does not write",
            hint=DAMAGED,
        ) from None
    write_atomically(folder / NAME, index.text())
    return tuple(results)


def _run_facts(recipe: Recipe, side: ClientSide, backbone: Backbone) -> RunFacts:
    packages = ["torch", "transformers", "peft", "lightning"]
    if recipe.backbone.quantization != "none":
        packages.append("bitsandbytes")
    return RunFacts(
        recipe=_as_adapted(recipe, side),
        base=BaseModel(
            hub_id(backbone.name),
            backbone.revision,
            _dtype(backbone),
            _prompts(side),
            backbone.task,
        ),
        clients=frozenset(side.dataset.client_ids),
        versions={"pfl-lm": pfl_lm.__version__, **{name: version(name) for name in packages}},
    )


def _as_adapted(recipe: Recipe, side: ClientSide) -> Recipe:
    """Return the recipe with its target modules by the names they have in this backbone."""
    targets = sorted(side.adapter.config.target_modules)
    if targets == sorted(recipe.adapter.target_modules):
        return recipe
    adapter = recipe.adapter.model_copy(update={"target_modules": targets})
    return recipe.model_copy(update={"adapter": adapter})


def _client_facts(
    result: ClientResult, side: ClientSide, traffic: tuple[int, int, int]
) -> ClientFacts:
    turns, bytes_down, bytes_up = traffic
    return ClientFacts(
        client=result.client,
        slug=result.slug,
        rows=_row_counts(result.client, side),
        choice=result.choice,
        scores=result.scores,
        turns=turns,
        bytes_down=bytes_down,
        bytes_up=bytes_up,
        spent=result.spent,
        own=side.own[result.client],
        metrics=result.metrics,
    )


def _row_counts(client: str, side: ClientSide) -> RowCounts:
    data = side.dataset[client]
    return RowCounts(
        train=len(data.train), validation=len(data.validation), test=len(data.test_rows)
    )


def _prompts(side: ClientSide) -> Prompts:
    return "text" if side.dataset.plain_text else "chat"


def _dtype(backbone: Backbone) -> str:
    return str(backbone.dtype).removeprefix("torch.")


def _final_scores(ledger: Ledger) -> dict[str, dict[str, dict[str, float]]]:
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for client, split, candidate, nll, *_ in ledger.final_scores():
        scores.setdefault(client, {}).setdefault(split, {})[candidate] = nll
    return scores


def _final_metrics(ledger: Ledger) -> dict[str, Metrics]:
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for client, split, candidate, metric, value in ledger.final_metrics():
        of_split = found.setdefault(client, {}).setdefault(split, {})
        of_split.setdefault(candidate, {})[metric] = value
    return dict(found)


def _index(
    recipe: Recipe, results: list[ClientResult], side: ClientSide, backbone: Backbone
) -> AdapterIndex:
    return AdapterIndex(
        format=1,
        run=RunEntry(
            name=recipe.name,
            method=recipe.method.name,
            rounds=recipe.federation.rounds,
            turn=_turn(side),
            prompts=_prompts(side),
            task=backbone.task.name,
            labels=list(backbone.task.labels) or None,
        ),
        base=BaseEntry(
            model_name_or_path=backbone.name, revision=backbone.revision, dtype=_dtype(backbone)
        ),
        clients={
            result.client: ClientEntry(
                slug=result.slug,
                candidate=result.choice.candidate,
                reason=result.choice.reason,
                rows=_row_counts(result.client, side),
                scores=_finite(result.scores),
                sha256=result.sha256,
            )
            for result in results
        },
    )


def _turn(side: ClientSide) -> str:
    """Return how long one client's turn is; where they differ, the shortest and the longest."""
    lengths = {each.training.length for each in side.own.values()}
    if len(lengths) == 1:
        return lengths.pop()
    steps = [side.own[each.id].training.steps_for(each.n_train) for each in side.dataset]
    return f"{min(steps)} to {max(steps)} steps"


def _finite(scores: dict[str, dict[str, float]]) -> dict[Split, dict[str, float | None]]:
    return {
        cast("Split", split): {
            name: nll if math.isfinite(nll) else None for name, nll in of_split.items()
        }
        for split, of_split in scores.items()
    }

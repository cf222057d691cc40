"""The sections of a card, each as Markdown: how it was made, how good it is, what to beware of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from pfl_lm.export.card_privacy import privacy_lines
from pfl_lm.export.card_recipe import shown_recipe
from pfl_lm.export.card_text import BaseModel, count, fenced, number, safe, size, table
from pfl_lm.export.index import BASE, RowCounts
from pfl_lm.privacy.spent import NO_LEVER, ClientSpent
from pfl_lm.recipe.own import Own
from pfl_lm.recipe.schema import Recipe

if TYPE_CHECKING:
    from pfl_lm.evaluate import Choice

CANDIDATES = {
    BASE: "the untouched backbone",
    "global": "the shared adapter",
    "realigned": "the shared adapter plus this client's own offset",
    "personal": "this client's own adapter, as the method makes it",
    "local": "this client's adapter right after its last local training",
}
"""What each candidate is, in the order of tables; a method may have others."""


@dataclass(frozen=True)
class RunFacts:
    """What all cards of a run share. ``versions`` by package."""

    recipe: Recipe
    base: BaseModel
    clients: frozenset[str]
    versions: Mapping[str, str]

    @cached_property
    def shown_recipe(self) -> str:
        """The recipe as cards show it, written once for all of them."""
        return shown_recipe(self.recipe, self.clients)


@dataclass(frozen=True, slots=True)
class ClientFacts:
    """What a client's card says of it.

    Attributes:
        scores: nats a supervised token, by split, then candidate, after the last round.
        turns: rounds in which it trained.
        bytes_down: adapter tensors it was sent, over all its turns; ``bytes_up`` those it sent.
        spent: what its data has spent of privacy.
        own: what it went by; None if that was the recipe's, as all others.
        metrics: other numbers, by split, then candidate, then name.
    """

    client: str
    slug: str
    rows: RowCounts
    choice: Choice
    scores: Mapping[str, Mapping[str, float]]
    turns: int
    bytes_down: int
    bytes_up: int
    spent: ClientSpent = NO_LEVER
    own: Own | None = None
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)


def base_name(base: BaseModel) -> str:
    """Return the base model as text, by its id on the Hub if it has one."""
    return f"`{base.hub_id}`" if base.hub_id else "a base model that is not on the Hub"


def n_clients(run: RunFacts) -> str:
    """Return how many clients took part, in words."""
    return count(len(run.clients), "client")


def lineage(run: RunFacts, facts: ClientFacts | None) -> str:
    """Return the table of how an adapter was made; without ``facts`` that of the shared one."""
    recipe = run.recipe
    training, adapter = recipe.training, recipe.largest_adapter
    if facts is not None and facts.own is not None:
        training, adapter = facts.own.training, facts.own.adapter
    others = "; other for some clients" if facts is None and recipe.clients else ""
    rounds = f"{recipe.federation.rounds} rounds"
    if facts is not None:
        rounds += f"; this client trained in {facts.turns} of them"
    layers = adapter.layers_to_transform
    modules = ", ".join(f"`{module}`" for module in adapter.target_modules)
    rows = [
        ("base model", f"{base_name(run.base)}, frozen, {_kept(run)}{_package(recipe)}"),
        ("method", f"{recipe.method.name}, {rounds}"),
        (
            "local training",
            f"{training.length} a round, {training.optimizer}, learning rate "
            f"{training.learning_rate:g}, {training.rows_in_step} rows a step{others}",
        ),
        (
            "LoRA",
            f"r {adapter.r}, alpha {adapter.lora_alpha:g}, dropout {adapter.lora_dropout:g}, on "
            f"{modules} of {'all layers' if layers is None else _layers(layers)}",
        ),
    ]
    if facts is not None:
        had = facts.rows
        counts = f"{count(had.train, 'row')} to train on, {had.validation} to validate"
        rows += [
            ("data", f"{counts}, {had.test} to test"),
            ("received", f"{size(facts.bytes_down)} of adapter weights, over all rounds"),
            ("uploaded", f"{size(facts.bytes_up)} of adapter weights, over all rounds"),
        ]
    return table(("", ""), rows)


def _kept(run: RunFacts) -> str:
    quantization = run.recipe.backbone.quantization
    kept = run.base.dtype
    return kept if quantization == "none" else f"{quantization} by bitsandbytes and {kept}"


def _package(recipe: Recipe) -> str:
    backbone = recipe.backbone
    if backbone.package is None:
        return ""
    file = backbone.gguf_file or backbone.folder or ""
    named = f"`{file}`" if re.fullmatch(r"[\w./-]+", file, re.ASCII) else safe(file)
    return f", {named} from the package `{backbone.package}`"


def _layers(layers: list[int]) -> str:
    return f"layers {', '.join(map(str, sorted(layers)))}"


def score_table(facts: ClientFacts) -> str:
    """Return every candidate's loss on test rows, or on validation rows where there are none."""
    split = "test" if "test" in facts.scores else "validation"
    scores = facts.scores[split]
    metrics = facts.metrics.get(split, {})
    classes = any("accuracy" in of_model for of_model in metrics.values())
    beside = ("accuracy", "macro_f1") if classes else ()
    known = [name for name in CANDIDATES if name in scores]
    rows = []
    for name in [*known, *sorted(scores.keys() - CANDIDATES.keys())]:
        chosen = name == facts.choice.candidate
        rows.append(
            (
                f"**{safe(name)}** (chosen)" if chosen else safe(name),
                CANDIDATES.get(name, ""),
                number(scores[name]),
                "" if name == BASE else f"{scores[name] - scores[BASE]:+.4f}",
                *(number(metrics.get(name, {}).get(metric)) for metric in beside),
            )
        )
    n_rows = facts.rows.test if split == "test" else facts.rows.validation
    own = count(n_rows, f"{split} row")
    when = "read once, after the choice" if split == "test" else "those the choice was made on"
    named = (name.replace("_", "-") for name in beside)
    head = ("model", "what it is", "loss", "minus base", *named)
    each = "row" if classes else "supervised token"
    return (
        f"Loss on this client's own {own} ({when}), nats a {each}, lower is "
        f"better.\n\n{table(head, rows, right=range(2, len(head)))}"
    )


def choice_paragraph(facts: ClientFacts) -> str:
    """Return which candidate was chosen and why, with the paired standard error."""
    choice = facts.choice
    said = f"Chosen by {count(facts.rows.validation, 'validation row')}: {choice.reason}."
    if choice.candidate == BASE:
        return f"{said}\n"
    error = choice.standard_error
    if not math.isfinite(error):
        doubt = "one row alone says nothing of the error"
    elif -choice.margin <= error:
        doubt = f"± {error:.4f}, one paired standard error: it may be chance"
    else:
        doubt = f"± {error:.4f}, one paired standard error"
    return f"{said} Against the backbone there: {choice.margin:+.4f} nats a token ({doubt}).\n"


def limits(run: RunFacts, spent: ClientSpent, *, shared: bool, uploads: bool) -> str:
    """Return what to beware of.

    Args:
        run: what all cards share.
        spent: of this client, or the largest of all clients.
        shared: whether this is the shared adapter.
        uploads: whether clients sent anything.
    """
    lines = _limits(run, spent, shared=shared, uploads=uploads)
    return "".join(f"- {line}\n" for line in lines)


def _limits(run: RunFacts, spent: ClientSpent, *, shared: bool, uploads: bool) -> Iterator[str]:
    yield (
        "**Federated is not private.** Adapter weights can memorize what they were trained on, and "
        "whoever has them can test for it. Treat this adapter as you would treat its training data"
        f"{'' if spent == NO_LEVER else ', as far as the next lines do not bound that'}."
    )
    yield from privacy_lines(run.recipe.privacy, spent, shared=shared)
    if uploads and spent.record_level is not None:
        yield (
            "The server of this run saw each client's upload by itself; nothing was encrypted "
            "against it. Uploads have the rows' noise in them."
        )
    elif uploads:
        yield (
            "What a client uploads is as telling as an adapter. The server of this run saw each "
            "client's upload by itself; unless the recipe below says so, nothing was encrypted "
            "against it and no noise was added."
        )
    if run.base.task.classifies:
        yield "The scores are of few rows of one client: they say little of texts of another kind."
    else:
        yield (
            "The scores are losses on few rows of one client: they say that its texts became more "
            "likely, not that answers are right, safe or fit for another purpose."
        )
    yield (
        "It changes only the base model named above, whose licence and limits apply. Nothing here "
        "says under which licence the training data may be used."
    )
    backbone = run.recipe.backbone
    if backbone.quantization != "none":
        yield (
            f"It was trained and scored on the base model quantized to {backbone.quantization}; "
            "the code above loads it in full precision, where losses differ a little. To merge, "
            "load it so and call `model.merge_and_unload()`: quantized weights would round part of "
            "the adapter away."
        )
    if run.base.hub_id is not None and backbone.model_name_or_path != run.base.hub_id:
        yield (
            "It was trained and scored against a copy of the base model, in a package or a folder. "
            "If that copy was quantized, scores with the original weights differ."
        )


def versions_and_recipe(run: RunFacts) -> str:
    """Return the end of a card: versions of what made it, and the whole recipe, folded away."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()))
    recipe = fenced(run.shown_recipe, "yaml")
    return (
        f"## Versions\n\n{versions}\n\n"
        f"<details>\n<summary>Recipe, every default filled in</summary>\n\n{recipe}\n</details>\n"
    )

"""The files a run leaves behind, and the room its tensors take on the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pfl_lm.federation.slugs import slugs
from pfl_lm.plan.traffic import Traffic
from pfl_lm.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Disk:
    """What a run writes.

    Attributes:
        files: paths within the run folder, as they stand when the run is over.
        at_end: bytes of tensors in them.
        at_most: bytes of tensors in the run folder at any time.
    """

    files: tuple[str, ...]
    at_end: int
    at_most: int


def planned_disk(
    recipe: Recipe,
    taking_part: Sequence[Sequence[str]],
    traffic: Mapping[str, Traffic],
    adapters: Mapping[str, int],
    largest: int,
) -> Disk:
    """List what a run of these clients leaves, of whom some take part in each round.

    ``traffic`` and ``adapters``, the bytes of its adapter, are each client's; ``largest`` are those
    of the server's adapter. While a round goes on, its clients' old and new states, their uploads
    and two states of the server lie side by side.
    """
    clients = list(traffic)
    first = traffic[clients[0]]
    last = {client: n for n, chosen in enumerate(taking_part, 1) for client in chosen}
    shared = "global" in first.candidates
    names = slugs(clients)

    state = {client: sum(each.state.values()) for client, each in traffic.items()}
    kept = sum(state[client] for client in last) + first.server
    exported = sum(adapters[client] for client in clients) + shared * largest
    in_round = max(sum(state[c] + traffic[c].up for c in chosen) for chosen in taking_part)
    during = kept + first.server + in_round
    return Disk(
        files=(
            *("recipe.yaml", "recipe.resolved.yaml", "federation.sqlite"),
            *("metrics.csv", "adapters.json"),
            f"server/state-{recipe.federation.rounds}.safetensors",
            *(f"clients/{names[c]}/state-{last[c]}.safetensors" for c in clients if c in last),
            *(path for c in clients for path in _peft_folder(f"adapters/{names[c]}")),
            *(_peft_folder("global") if shared else ()),
        ),
        at_end=kept + exported,
        at_most=max(kept + exported, during),
    )


def _peft_folder(folder: str) -> tuple[str, ...]:
    names = ("adapter_config.json", "adapter_model.safetensors", "README.md")
    return tuple(f"{folder}/{name}" for name in names)

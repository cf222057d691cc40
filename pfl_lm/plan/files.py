"""The files a run leaves behind, and the room its tensors take on the disk."""

from __future__ import annotations

from collections.abc import Sequence
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
    clients: Sequence[str],
    taking_part: Sequence[Sequence[str]],
    traffic: Traffic,
    adapter_bytes: int,
) -> Disk:
    """List what a run of these clients leaves, of whom some take part in each round.

    ``adapter_bytes`` are those of one adapter. While a round goes on, its clients' old and new
    states, their uploads and two states of the server lie side by side.
    """
    last = {client: n for n, chosen in enumerate(taking_part, 1) for client in chosen}
    shared = "global" in traffic.candidates
    names = slugs(clients)

    state = sum(traffic.state.values())
    kept = len(last) * state + traffic.server
    exported = (len(clients) + shared) * adapter_bytes
    during = kept + traffic.server + max(map(len, taking_part)) * (state + traffic.up)
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

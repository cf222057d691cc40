"""What is measured: one client's turn, as a recipe has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfl_lm.data.batches import training_batches
from pfl_lm.data.examples import Example
from pfl_lm.data.federated import FederatedDataset
from pfl_lm.data.splits import ClientRows
from pfl_lm.errors import RecipeError
from pfl_lm.layout import Vector
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import Backbone, load_backbone
from pfl_lm.model.outline import find_source
from pfl_lm.model.states import TrunkStates, states_of
from pfl_lm.recipe import LoadedRecipe, Recipe
from pfl_lm.seeds import derive_seed

RATE = 1e-3
"""In the place of `learning_rate: auto`; no step takes longer at another rate."""


@dataclass(frozen=True, slots=True)
class Did:
    """What came of one turn: where it ended, and the bytes of tensors it sent and was sent.

    ``end`` is None where the method itself decides what a turn ends with.
    """

    end: Vector | None = None
    up: int | None = None
    down: int | None = None


@dataclass(frozen=True)
class Case:
    """One client's turn, and the resident backbone it is taken on.

    Attributes:
        recipe: with a number for a learning rate, and the number of steps as a number.
        place: where the backbone's files are, a folder or a Hub id.
        disk: the folder in which what a turn writes is written, for as long as it is measured.
        trunk: what rows are below the first adapted layer; filled by the first turn. None if
            nothing is remembered.
    """

    recipe: Recipe
    backbone: Backbone
    place: str | Path
    dataset: FederatedDataset
    client: str
    steps: int
    disk: Path
    trunk: TrunkStates | None = field(default_factory=TrunkStates)

    @property
    def examples(self) -> tuple[Example, ...]:
        """The client's training rows."""
        return self.dataset.train(self.client)

    @property
    def seed(self) -> int:
        """What fixes the turn's batches: that of the client's turn in round 1."""
        return derive_seed(self.recipe.seed, "turn", self.client, 1)

    @property
    def fits(self) -> int:
        """How many local trainings the method's turn is."""
        from pfl_lm.methods import METHODS

        return METHODS[self.recipe.method.name].fits

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.backbone.device

    def batches(self) -> Any:
        """Return a loader of the turn's micro-batches, in their order."""
        training = self.recipe.training
        return training_batches(
            self.examples,
            steps=self.steps,
            accumulation=training.gradient_accumulation_steps,
            batch_size=training.per_device_train_batch_size,
            pad_token_id=self.backbone.pad_token_id,
            seed=self.seed,
            group_by_length=self.recipe.data.group_by_length,
        )

    def windows(self) -> Iterator[list[Mapping[str, Any]]]:
        """Yield the micro-batches of each optimizer step, placed on the device."""
        batches = iter(self.batches())
        for _ in range(self.steps):
            accumulation = self.recipe.training.gradient_accumulation_steps
            yield [self._placed(next(batches)) for _ in range(accumulation)]

    @contextmanager
    def adapter(
        self, *, trunk: TrunkStates | None = None, all_layers: bool = False
    ) -> Iterator[Adapter]:
        """Put the recipe's adapter into the backbone for as long as the body runs.

        ``trunk``: where it remembers the layers below. ``all_layers``: in every layer.
        """
        options = self.recipe.adapter
        if all_layers:
            options = options.model_copy(update={"layers_to_transform": None})
        seed = derive_seed(self.recipe.seed, "adapter")
        compile = self.recipe.runtime.compile
        adapter = Adapter(self.backbone, options, seed=seed, trunk=trunk, compile=compile)
        try:
            yield adapter
        finally:
            adapter.close()

    def _placed(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }


def load_case(
    loaded: LoadedRecipe,
    rows: Mapping[str, ClientRows],
    device: torch.device,
    disk: Path,
    *,
    steps: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Case:
    """Load the backbone and the rows of a recipe that was checked, and choose a client.

    It is the client in the middle, by the mean length of its training rows.

    Raises:
        PflError: the backbone cannot be loaded, a client's rows cannot be learned from, or the
            recipe asks for what not every loop here does: private training, a quantized backbone,
            one on several GPUs, gradient checkpointing, rules for some clients.
    """
    recipe = loaded.recipe
    if recipe.privacy.record_level is not None:
        raise RecipeError(
            "privacy.record_level: private steps are not measured, no loop here does their work",
            hint="leave it out for the measurement: privacy.record_level=null",
        )
    if recipe.clients:
        raise RecipeError(
            "clients: a measurement is of one client like all others",
            hint="leave the rules out for the measurement: clients=[]",
        )
    _refuse_other_loading(recipe)
    if recipe.task != "causal_lm":
        raise RecipeError(
            f"task: {recipe.task} is not measured: the loops by hand and the stock Trainer are "
            "those of a causal language model",
            hint="plan says what a run would take: pfl-lm plan",
        )
    backbone = load_backbone(recipe.backbone, device, say)
    place = find_source(recipe.backbone).place
    dataset = FederatedDataset.build(rows, backbone.tokenizer, *recipe.data.length)
    client = _middle(dataset)
    training = recipe.training
    steps = steps or training.steps_for(dataset.n_train(client))
    rate = RATE if training.rate_is_auto else training.learning_rate
    fixed = {"max_steps": steps, "local_epochs": None, "learning_rate": rate}
    recipe = recipe.model_copy(update={"training": training.model_copy(update=fixed)})
    trunk = states_of(recipe.runtime)
    case = Case(recipe, backbone, place, dataset, client, steps, disk, trunk)
    with case.adapter(trunk=case.trunk) as adapter:
        remembers = recipe.runtime.trunk_cache != "off" and adapter.forward is not adapter.model
    return case if remembers else replace(case, trunk=None)


def _refuse_other_loading(recipe: Recipe) -> None:
    """Check that the loops beside pfl-lm's, one of which loads the model anew, do the same work."""
    asked = (
        ("backbone.quantization", recipe.backbone.quantization != "none", "none"),
        ("backbone.device_map", recipe.backbone.device_map is not None, "null"),
        ("training.gradient_checkpointing", recipe.training.gradient_checkpointing, "false"),
    )
    for key, is_set, without in asked:
        if is_set:
            raise RecipeError(
                f"{key}: is not measured, the loops beside pfl-lm's do not do it",
                hint=f"leave it out for the measurement: {key}={without}",
            )


def _middle(dataset: FederatedDataset) -> str:
    ids = sorted(dataset.client_ids, key=lambda client: (_length(dataset.train(client)), client))
    return ids[len(ids) // 2]


def _length(examples: Sequence[Example]) -> float:
    return sum(len(example.input_ids) for example in examples) / len(examples)

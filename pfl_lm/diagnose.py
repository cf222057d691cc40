"""The PAC-Bayes style figures of a finished run: its exported adapters on their own train rows.

A diagnostic of the run, and not the bound of the pFLAlign paper; `pfl_lm.evaluate.pac_bayes` says
what is computed. Nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from accelerate import Accelerator

from pfl_lm.data.federated import FederatedDataset
from pfl_lm.data.labels import task_of
from pfl_lm.data.splits import rows_to_train
from pfl_lm.errors import ExportError
from pfl_lm.evaluate import BASE
from pfl_lm.evaluate.gibbs import noisy_token_error, token_error
from pfl_lm.evaluate.pac_bayes import (
    SIGMAS,
    VACUOUS,
    figure,
    fixed_model_figure,
    gaussian_kl,
    least_figure,
)
from pfl_lm.export.index import read_index
from pfl_lm.export.reading import exported_vector
from pfl_lm.federation.fleet.start import set_threads
from pfl_lm.federation.opening import refuse_other_backbone
from pfl_lm.layout import Vector
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import load_backbone
from pfl_lm.model.states import TrunkStates
from pfl_lm.recipe import LoadedRecipe, Recipe
from pfl_lm.resume import glance, run_clients
from pfl_lm.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class ClientFigure:
    """One client's figure, and what it comes from.

    Attributes:
        candidate: which model is the client's.
        n_rows: its train rows.
        distance: ‖w_i - w_0‖, to the untouched adapter of round 0.
        sigma: the σ that gave the least figure; None if at each the KL alone leaves no room.
        divergence: KL at that σ, in nats; at the largest σ if there is none.
        error: the error measured at that σ, the mean over rows and noises.
        figure: at most 1.
        backbone: the figure of the untouched backbone, a fixed model.
    """

    client: str
    candidate: str
    n_rows: int
    distance: float
    sigma: float | None
    divergence: float
    error: float | None
    figure: float
    backbone: float

    @property
    def vacuous(self) -> bool:
        """Whether it says nothing, since no error is above 1."""
        return self.figure >= VACUOUS

    @property
    def verdict(self) -> str:
        """What it comes to, in a few words."""
        if self.vacuous:
            return "vacuous"
        if self.candidate == BASE:
            return "not vacuous; it keeps the backbone"
        if self.figure >= self.backbone:
            return "not vacuous, but above the backbone's"
        return "not vacuous, and below the backbone's"


def client_figures(
    loaded: LoadedRecipe, samples: int, say: Callable[[str], None]
) -> Iterator[ClientFigure]:
    """Yield the figure of each client of a finished run, in id order.

    Every σ takes up to ``samples`` forward passes a train row; a σ that cannot give less than was
    found already takes none.

    Raises:
        PflError: the run, its rows, its backbone or its adapters are not what its ledger says.
    """
    recipe, folder = loaded.recipe, loaded.run_folder
    if recipe.mixes_ranks:
        raise ExportError(
            f"{folder}: its clients' adapters differ in rank or modules, and the figures are "
            "of adapters of one shape",
            hint="they can be had of runs without `r` and `target_modules` in `clients`",
        )
    index = read_index(folder)
    clients = run_clients(loaded)
    if strangers := sorted(index.clients.keys() - clients.keys()):
        raise ExportError(f"{folder}: adapters.json has {strangers[0]!r}, no client of this run")
    accelerator = Accelerator()
    set_threads(recipe.runtime, accelerator)
    say(f"loading the backbone onto {accelerator.device}")
    task = task_of(recipe, clients)
    backbone = load_backbone(recipe.backbone, accelerator.device, say, task)
    with glance(folder) as ledger:
        about = {} if ledger is None else ledger.about()
    refuse_other_backbone(about, {"backbone": backbone.fingerprint}, folder)
    lengths = recipe.own_lengths(rows_to_train(clients))
    dataset = FederatedDataset.build(
        clients, backbone.tokenizer, *recipe.data.length, lengths, task
    )
    seed = derive_seed(recipe.seed, "adapter")
    trunk = None if recipe.runtime.trunk_cache == "off" else TrunkStates()
    with closing(Adapter(backbone, recipe.adapter, seed=seed, trunk=trunk)) as adapter:
        prior = adapter.read()
        for client, entry in sorted(index.clients.items()):
            vector = exported_vector(folder, entry, adapter)
            rows = _Rows(recipe, adapter, dataset, client, backbone.pad_token_id)
            yield _figure(rows, entry.candidate, vector, prior, samples)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A client's train rows, and how to measure a model on them."""

    recipe: Recipe
    adapter: Adapter
    dataset: FederatedDataset
    client: str
    pad_token_id: int

    @property
    def n(self) -> int:
        return self.dataset.n_train(self.client)

    def error(self, vector: Vector) -> float:
        return token_error(
            self.adapter,
            vector,
            self.dataset.train(self.client),
            batch_size=self.recipe.training.per_device_eval_batch_size,
            pad_token_id=self.pad_token_id,
        )

    def noisy_error(self, vector: Vector, sigma: float, samples: int) -> float:
        return noisy_token_error(
            self.adapter,
            vector,
            self.dataset.train(self.client),
            sigma=sigma,
            samples=samples,
            pad_token_id=self.pad_token_id,
            seed=derive_seed(self.recipe.seed, "pac_bayes", self.client, repr(sigma)),
        )


def _figure(
    rows: _Rows, candidate: str, vector: Vector, prior: Vector, samples: int
) -> ClientFigure:
    squared = float((vector.double() - prior.double()).square().sum())
    best, sigma, error = 1.0, None, None
    for each in sorted(SIGMAS, reverse=True):  # the smallest KL first
        divergence = gaussian_kl(squared, each)
        if least_figure(divergence, rows.n) >= min(best, VACUOUS):
            continue
        measured = rows.noisy_error(vector, each, samples)
        found = figure(measured, samples * rows.n, divergence, rows.n)
        if sigma is None or found < best:
            best, sigma, error = found, each, measured
    return ClientFigure(
        client=rows.client,
        candidate=candidate,
        n_rows=rows.n,
        distance=math.sqrt(squared),
        sigma=sigma,
        divergence=gaussian_kl(squared, max(SIGMAS) if sigma is None else sigma),
        error=error,
        figure=best,
        backbone=fixed_model_figure(rows.error(prior), rows.n),
    )

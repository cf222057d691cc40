"""The one place that puts a run together from a recipe, in the order of the walk.

recipe → data → backbone and adapter → method → rounds → exported adapters → metrics
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator

import pfl_lm
from pfl_lm.data.federated import FederatedDataset
from pfl_lm.data.splits import ClientRows
from pfl_lm.errors import PflError
from pfl_lm.export.adapters import ClientResult, export_adapters
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.cohort import cohort
from pfl_lm.federation.fleet.serial import SerialFleet
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.rounds import Orchestrator
from pfl_lm.federation.slugs import slugs
from pfl_lm.federation.store import Store
from pfl_lm.federation.watch import Watch, Workload
from pfl_lm.files import write_atomically
from pfl_lm.methods import METHODS, ServerState, Setup
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import load_backbone
from pfl_lm.preflight import preflight, refuse_occupied
from pfl_lm.recipe import LoadedRecipe, Recipe
from pfl_lm.report.metrics import write_metrics
from pfl_lm.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run: its folder, and every client's result in id order."""

    folder: Path
    clients: tuple[ClientResult, ...]


def finetune(
    loaded: LoadedRecipe,
    watch: Watch | None = None,
    clients: Mapping[str, ClientRows] | None = None,
) -> RunResult:
    """Run a recipe from its data to one exported adapter per client.

    Nothing is written before everything that can be checked beforehand has been. ``clients`` are
    the rows of a recipe that was checked already; without them it is checked here.

    Raises:
        PflError: the recipe, its data, its backbone or the run folder cannot be used.
    """
    watch = watch or Watch()
    recipe = loaded.recipe
    rows_by_client = preflight(loaded) if clients is None else clients
    accelerator = _accelerator()
    torch.set_num_threads(recipe.runtime.threads or torch.get_num_threads())

    watch.note(f"loading the backbone onto {accelerator.device}")
    backbone = load_backbone(recipe.backbone, accelerator.device, watch.note)
    adapter = Adapter(backbone, recipe.adapter, seed=derive_seed(recipe.seed, "adapter"))
    dataset = FederatedDataset.build(rows_by_client, backbone.tokenizer, recipe.data.max_length)
    _note_cut_rows(dataset, recipe, watch)

    folder = loaded.run_folder
    names = slugs(dataset.client_ids)
    ledger = _open(loaded, folder, names, dataset)
    try:
        start = adapter.read()
        method = METHODS[recipe.method.name](
            recipe.method, Setup(adapter.layout, len(dataset), recipe.seed, recipe.training)
        )
        store = Store(folder, names, accelerator.device)
        side = ClientSide(
            method=method,
            adapter=adapter,
            start=start,
            dataset=dataset,
            training=recipe.training,
            pad_token_id=backbone.pad_token_id,
            store=store,
            ledger=ledger,
            watch=watch,
        )
        orchestrator = Orchestrator(
            recipe, dataset.client_ids, method, SerialFleet(side), store, ledger, watch
        )
        server = method.init_server(start)
        watch.begin(_workload(recipe, side, server))
        server = orchestrator.run(server)
        results = export_adapters(folder, recipe, side, server, backbone)
        write_metrics(folder / "metrics.csv", ledger)
    except BaseException:
        with suppress(PflError):  # what was scored before the end is worth keeping
            write_metrics(folder / "metrics.csv", ledger)
        raise
    finally:
        ledger.close()
    return RunResult(folder, results)


def _accelerator() -> Accelerator:
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise PflError(
            f"started as {accelerator.num_processes} processes; this version runs as one",
            hint="start it with `pfl-lm finetune …`, without torchrun or accelerate launch",
        )
    return accelerator


def _open(
    loaded: LoadedRecipe, folder: Path, names: dict[str, str], dataset: FederatedDataset
) -> Ledger:
    refuse_occupied(folder)
    write_atomically(folder / "recipe.yaml", loaded.source_text.encode())
    write_atomically(folder / "recipe.resolved.yaml", loaded.resolved().encode())
    ledger = Ledger(folder / "federation.sqlite")
    about = {
        "name": loaded.recipe.name,
        "method": loaded.recipe.method.name,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "pfl_lm": pfl_lm.__version__,
        **{package: version(package) for package in ("torch", "transformers", "peft", "lightning")},
    }
    clients = [
        (c.id, names[c.id], len(c.train), len(c.validation), len(c.test_rows)) for c in dataset
    ]
    ledger.open_run(about, clients)
    return ledger


def _workload(recipe: Recipe, side: ClientSide, server: ServerState) -> Workload:
    dataset = side.dataset
    rounds, ids = recipe.federation.rounds, dataset.client_ids
    turns = len(cohort(ids, recipe.federation.fraction_train, seed=0, round=1)) * rounds
    validation = sum(len(dataset.validation(client)) for client in ids)
    test = sum(len(dataset[client].test_rows) for client in ids)
    candidates = len(side.candidates(ids[0], side.method.broadcast(server, ids[0])))
    scored = validation * (rounds + candidates - 1) + test * candidates
    return Workload(
        rounds=rounds, clients=len(ids), steps=turns * recipe.training.max_steps, rows=scored
    )


def _note_cut_rows(dataset: FederatedDataset, recipe: Recipe, watch: Watch) -> None:
    counts = [c for client in dataset for c in client.counts.values()]
    cut, dropped = sum(c.truncated for c in counts), sum(c.dropped for c in counts)
    if cut or dropped:
        rows = sum(c.rows for c in counts)
        watch.note(
            f"{cut} of {rows} train and validation rows are cut at data.max_length "
            f"{recipe.data.max_length}, {dropped} more are dropped: nothing of the answer was left"
        )

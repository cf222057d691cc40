"""The one place that puts a run together from a recipe, in the order of the walk.

recipe → data → backbone and adapter → method → rounds → exported adapters → metrics
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator

import pfl_lm
from pfl_lm.data.federated import FederatedDataset
from pfl_lm.data.labels import labelled, task_of
from pfl_lm.data.splits import ClientRows, rows_to_train
from pfl_lm.errors import PflError
from pfl_lm.evaluate import RowScores
from pfl_lm.evaluate.answers import Answers
from pfl_lm.export.adapters import ClientResult, export_adapters
from pfl_lm.federation.behind import Behind
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.cohort import Cohorts
from pfl_lm.federation.fleet.links import links
from pfl_lm.federation.fleet.ranks import RankFleet, leading, serve
from pfl_lm.federation.fleet.serial import Fleet, SerialFleet
from pfl_lm.federation.fleet.start import (
    join_ranks,
    lone_launch,
    rank_0_first,
    refuse_spread_over_ranks,
    set_threads,
)
from pfl_lm.federation.history import Member
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.messages import Split
from pfl_lm.federation.noise import noise_seed
from pfl_lm.federation.opening import begun, gone_on_with
from pfl_lm.federation.own import own_layouts, own_rates
from pfl_lm.federation.rate import MOST_HALVINGS, first_rate, no_rate, with_training
from pfl_lm.federation.rounds import Orchestrator
from pfl_lm.federation.sharing import Sharing, sharing
from pfl_lm.federation.slugs import slugs
from pfl_lm.federation.store import Store
from pfl_lm.federation.watch import Watch
from pfl_lm.federation.workload import workload
from pfl_lm.files import sha256_of
from pfl_lm.layout import Vector
from pfl_lm.methods import METHODS, ServerState, Setup
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import Backbone, load_backbone
from pfl_lm.model.gguf import cache_folder
from pfl_lm.model.states import TrunkStates, states_of
from pfl_lm.model.tasks import refuse_few_positions
from pfl_lm.preflight import preflight, preflight_resume, refuse_occupied
from pfl_lm.privacy.clients import ClientLevel
from pfl_lm.recipe import LoadedRecipe, Recipe
from pfl_lm.recipe.privacy import loose_deltas
from pfl_lm.report.metrics import write_metrics
from pfl_lm.report.tracking import tracked
from pfl_lm.resume import run_slugs, run_way
from pfl_lm.seeds import derive_seed
from pfl_lm.train.rate import RateTooHighError


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run: its folder, and every client's result in id order."""

    folder: Path
    clients: tuple[ClientResult, ...]


@dataclass(frozen=True, slots=True)
class Common:
    """What runs of one backbone and the same clients need not each do again.

    Attributes:
        backbone: frozen, with no adapter in it.
        dataset: every client's examples in its tokens.
        base: how the untouched backbone did; filled as runs score it.
        trunk: what rows are below the first adapted layer; filled as runs meet them.
    """

    backbone: Backbone
    dataset: FederatedDataset
    base: dict[tuple[str, Split], RowScores] = field(default_factory=dict)
    trunk: TrunkStates = field(default_factory=TrunkStates)


def finetune(
    loaded: LoadedRecipe,
    watch: Watch | None = None,
    clients: Mapping[str, ClientRows] | None = None,
    *,
    resume: bool = False,
    common: Common | None = None,
) -> RunResult:
    """Run a recipe from its data to one exported adapter per client.

    Nothing is written before everything that can be checked beforehand has been. ``clients`` are
    the rows of a recipe that was checked already; without them it is checked here. With ``resume``
    the run in the recipe's folder is gone on with, wherever it was left. ``common`` is what another
    run has loaded for the same backbone and the same ``clients``.

    Raises:
        PflError: the recipe, its data, its backbone or the run folder cannot be used.
    """
    recipe = loaded.recipe
    accelerator = join_ranks(recipe.runtime)
    main = accelerator.is_main_process
    watch = watch if watch is not None and main else Watch()
    if clients is None:
        clients = preflight_resume(loaded) if resume else preflight(loaded)
    recipe = labelled(recipe, clients)
    loaded = replace(loaded, recipe=recipe)
    set_threads(recipe.runtime, accelerator)
    if advice := lone_launch():
        watch.note(advice)

    def prepare() -> tuple[Common, Adapter]:
        refuse_spread_over_ranks(recipe.backbone, accelerator)
        ready = common or load_common(recipe, clients, accelerator.device, watch)
        return ready, Adapter(
            ready.backbone,
            recipe.largest_adapter,
            seed=derive_seed(recipe.seed, "adapter"),
            trunk=None if recipe.runtime.trunk_cache == "off" else ready.trunk,
            compile=recipe.runtime.compile,
            gradient_checkpointing=recipe.training.gradient_checkpointing,
        )

    # one rank converts what has to be converted
    ready, adapter = rank_0_first(accelerator, prepare)
    if accelerator.num_processes > 1:
        links()
    backbone, dataset = ready.backbone, ready.dataset
    names = run_slugs(loaded.run_folder) if resume else slugs(dataset.client_ids)
    # another rank's state has to be on disk when it answers, for its row is rank 0's to write
    behind = Behind() if main else None
    store = Store(loaded.run_folder, names, accelerator.device, behind)
    fixed = _Fixed(
        accelerator,
        backbone,
        adapter,
        adapter.read(),
        dataset,
        store,
        watch,
        ready.base,
        rows_to_train(clients),
    )
    with closing(adapter):
        if main:
            with leading(accelerator):
                return _lead(loaded, fixed, _members(dataset, names, clients), resume=resume)
        serve(lambda training: _side(with_training(recipe, training), fixed))
        return RunResult(loaded.run_folder, ())


def load_common(
    recipe: Recipe, clients: Mapping[str, ClientRows], device: torch.device, watch: Watch
) -> Common:
    """Load what does not depend on a run's method, seed or rate.

    Raises:
        PflError: the backbone cannot be loaded, or a client's rows cannot be learned from.
    """
    watch.note(f"loading the backbone onto {device}")
    task = task_of(recipe, clients)
    backbone = load_backbone(recipe.backbone, device, watch.note, task)
    refuse_few_positions(backbone, recipe.data.max_length)
    kept = None if recipe.runtime.token_cache == "off" else cache_folder() / "tokens"
    dataset = FederatedDataset.build(
        clients,
        backbone.tokenizer,
        *recipe.data.length,
        recipe.own_lengths(rows_to_train(clients)),
        task,
        kept=kept,
    )
    _note_cut_rows(dataset, recipe, watch)
    for told in loose_deltas(recipe.privacy, {c.id: c.n_train for c in dataset}):
        watch.note(told)
    _note_idle_rule(dataset, recipe, watch)
    return Common(backbone, dataset, trunk=states_of(recipe.runtime))


def _lead(loaded: LoadedRecipe, fixed: _Fixed, members: list[Member], *, resume: bool) -> RunResult:
    """Do what one rank alone does: open the run folder, run the rounds, export, report."""
    folder, runtime = loaded.run_folder, loaded.recipe.runtime
    way = _sharing(loaded.recipe, fixed, run_way(folder) if resume else None)
    about = {**_about(loaded.recipe, fixed), "parallel": way.noted}
    if way.why:
        fixed.watch.note(way.why)
    if resume:
        opened = gone_on_with(loaded, about, fixed.store, fixed.watch)
    else:
        refuse_occupied(folder)
        opened = begun(loaded, about, members)
    with opened as ledger:
        try:
            with tracked(fixed.watch, runtime, folder, fixed.store.slugs) as watch:
                side, server = _run(loaded.recipe, replace(fixed, watch=watch, sharing=way), ledger)
            recipe = with_training(loaded.recipe, side.training)
            results = export_adapters(folder, recipe, side, server, fixed.backbone, ledger)
            write_metrics(folder / "metrics.csv", ledger)
            ledger.note("finished", str(recipe.federation.rounds))
        except BaseException:
            with suppress(PflError):  # what was scored before the end is worth keeping
                write_metrics(folder / "metrics.csv", ledger)
            raise
    return RunResult(folder, results)


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What a run has on every rank, whatever its learning rate turns out to be.

    ``n_rows`` are each client's train rows as they were read, by which ``clients``' rules go.
    """

    accelerator: Accelerator
    backbone: Backbone
    adapter: Adapter
    start: Vector
    dataset: FederatedDataset
    store: Store
    watch: Watch
    base: dict[tuple[str, Split], RowScores]
    n_rows: Mapping[str, int]
    sharing: Sharing | None = None


def _run(recipe: Recipe, fixed: _Fixed, ledger: Ledger) -> tuple[ClientSide, ServerState]:
    """Run every round; with ``learning_rate: auto``, from the first rate at which none rises."""
    if not recipe.training.rate_is_auto:
        return _rounds(recipe, fixed, ledger)
    known = ledger.number("learning_rate")
    rate = first_rate(recipe, _side(recipe, fixed)) if known is None else known
    if known is None:
        ledger.note("learning_rate", repr(rate))
    for _ in range(MOST_HALVINGS):
        fixed.watch.note(f"learning_rate: auto chose {rate:g}")
        training = recipe.training.model_copy(update={"learning_rate": rate})
        try:
            with_rate = with_training(recipe, training)
            return _rounds(with_rate, fixed, ledger, check_first_round=True)
        except RateTooHighError as error:
            fixed.watch.note(f"too high: the loss of {error}; starting again with half of it")
            rate /= 2
            fixed.store.discard(ledger.start_over(learning_rate=repr(rate)))
    raise no_rate(rate)


def _rounds(
    recipe: Recipe, fixed: _Fixed, ledger: Ledger, *, check_first_round: bool = False
) -> tuple[ClientSide, ServerState]:
    secret = noise_seed(ledger) if recipe.privacy.first_asked else None
    side = _side(recipe, fixed, secret)
    fleet: Fleet = SerialFleet(side)
    if fixed.accelerator.num_processes > 1:
        assert fixed.sharing is not None
        fleet = RankFleet(side, links(), together=fixed.sharing.way == "data")
    steps = {c.id: side.training_of(c.id).steps_for(c.n_train) for c in fixed.dataset}
    cohorts = Cohorts.of(recipe, {c.id: c.n_train for c in fixed.dataset})
    server = side.method.init_server(fixed.start)
    _note_own_candidate(side, server, ledger)
    fixed.watch.begin(workload(cohorts, side, steps, server, ledger))
    orchestrator = Orchestrator(
        recipe=recipe,
        steps=steps,
        cohorts=cohorts,
        method=side.method,
        fleet=fleet,
        store=fixed.store,
        ledger=ledger,
        watch=fixed.watch,
        check_first_round=check_first_round,
        secret=secret,
        scaled=fixed.adapter.is_half,
    )
    return side, orchestrator.run(server)


def _side(recipe: Recipe, fixed: _Fixed, secret: int | None = None) -> ClientSide:
    """Build what carries out tasks on this rank; the one that averages needs the ``secret``."""
    own = {client: recipe.own(client, fixed.n_rows[client]) for client in fixed.dataset.client_ids}
    asked = recipe.evaluation.metrics
    setup = Setup(
        layout=fixed.adapter.layout,
        n_clients=len(fixed.dataset),
        seed=recipe.seed,
        training=recipe.training,
        aggregation=recipe.aggregation,
        client_level=ClientLevel.of(recipe.privacy, secret),
        layouts=own_layouts(fixed.adapter.layout, recipe, own),
        rates=own_rates(recipe, own),
    )
    return ClientSide(
        method=METHODS[recipe.method.name](recipe.method, setup),
        adapter=fixed.adapter,
        start=fixed.start,
        dataset=fixed.dataset,
        training=recipe.training,
        pad_token_id=fixed.backbone.pad_token_id,
        store=fixed.store,
        watch=fixed.watch,
        base=fixed.base,
        group_by_length=recipe.data.group_by_length,
        record_level=recipe.privacy.record_level,
        diagnose=recipe.runtime.diagnostics,
        own=own,
        private_head=recipe.adapter.head == "private",
        answers=Answers(fixed.backbone.tokenizer, recipe.evaluation) if asked else None,
    )


def _note_own_candidate(side: ClientSide, server: ServerState, ledger: Ledger) -> None:
    """Commit what the method's own candidate is called: the one that stands unless beaten."""
    client = side.dataset.client_ids[0]
    own = next(iter(side.candidates(client, side.method.broadcast(server, client), None)))
    if ledger.about().get("own_candidate") != own:
        ledger.note("own_candidate", own)


def _sharing(recipe: Recipe, fixed: _Fixed, begun: str | None) -> Sharing:
    n_ranks = fixed.accelerator.num_processes
    cohorts = Cohorts.of(recipe, {c.id: c.n_train for c in fixed.dataset}) if n_ranks > 1 else None
    sizes = [] if cohorts is None else [len(chosen) for chosen in cohorts.all()]
    rows = recipe.task == "causal_lm"
    return sharing(recipe.runtime.parallel, n_ranks, sizes, begun, rows=rows)


def _about(recipe: Recipe, fixed: _Fixed) -> dict[str, str]:
    """Return what a run notes of itself, to know later whether it is still the same."""
    packages = ["torch", "transformers", "peft", "lightning"]
    if recipe.backbone.quantization != "none":
        packages.append("bitsandbytes")
    return {
        "name": recipe.name,
        "method": recipe.method.name,
        "backbone": fixed.backbone.fingerprint,
        **({"trace": sha256_of(Path(trace))} if (trace := recipe.federation.availability) else {}),
        "device": fixed.accelerator.device.type,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "pfl_lm": pfl_lm.__version__,
        **{package: version(package) for package in packages},
    }


def _members(
    dataset: FederatedDataset, names: Mapping[str, str], clients: Mapping[str, ClientRows]
) -> list[Member]:
    return [
        Member(
            c.id,
            names[c.id],
            len(c.train),
            len(c.validation),
            len(c.test_rows),
            clients[c.id].sha256,
        )
        for c in dataset
    ]


def _note_cut_rows(dataset: FederatedDataset, recipe: Recipe, watch: Watch) -> None:
    counts = [c for client in dataset for c in client.counts.values()]
    rows, longest = sum(c.rows for c in counts), f"data.max_length {recipe.data.max_length}"
    if long := sum(c.long for c in counts):
        watch.note(
            f"{long} of {rows} train and validation rows are longer than {longest}, and left out"
        )
    cut, dropped = sum(c.truncated for c in counts), sum(c.dropped for c in counts)
    if cut or dropped:
        watch.note(
            f"{cut} of {rows} train and validation rows are cut at {longest}, "
            f"{dropped} more are dropped: nothing of the answer was left"
        )


def _note_idle_rule(dataset: FederatedDataset, recipe: Recipe, watch: Watch) -> None:
    in_round = recipe.federation.cohort_size(len(dataset))
    if told := recipe.aggregation.bears_none(in_round):
        watch.note(told)

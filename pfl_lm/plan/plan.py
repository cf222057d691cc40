"""A run, planned: everything up to the first round but the weights, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from pfl_lm.data.examples import Example
from pfl_lm.data.federated import ClientData, FederatedDataset
from pfl_lm.data.labels import task_of
from pfl_lm.data.splits import ClientRows, rows_to_train
from pfl_lm.federation.cohort import Cohorts
from pfl_lm.federation.own import own_layouts, own_rates
from pfl_lm.federation.sharing import planned
from pfl_lm.layout import AdapterLayout
from pfl_lm.methods import METHODS, Setup
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import pick_dtype
from pfl_lm.model.outline import find_source, outline_backbone
from pfl_lm.model.states import MOST_BYTES
from pfl_lm.model.trunk import bytes_of_states
from pfl_lm.plan.files import Disk, planned_disk
from pfl_lm.plan.memory import Memory, process_bytes, vector_bytes
from pfl_lm.plan.rehearsal import Rehearsal, Shape, rehearse
from pfl_lm.plan.traffic import FLOAT, Traffic, count_traffic
from pfl_lm.privacy.spent import ClientSpent, largest, noted, spent_by_client
from pfl_lm.recipe import LoadedRecipe, Recipe
from pfl_lm.recipe.own import Own
from pfl_lm.recipe.task import TaskName


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """One client's rows by split, what became of them, and its optimizer steps in a round.

    ``cut`` and ``dropped`` are of train and validation rows, ``tokens`` the supervised ones of the
    train rows; ``own`` says in what rules make it differ from others.
    """

    id: str
    train: int
    validation: int
    test: int
    tokens: int
    cut: int
    dropped: int
    steps: int
    own: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would be.

    Attributes:
        device: where the backbone would be.
        dtype: the precision of its weights there.
        parameters: how many it has.
        weights: bytes that they take there.
        quantization: in which its linear layers are kept, or none.
        layout: of every adapter; of one with room for all, if some are ``smaller``.
        in_round: how many clients train in a round, at least and at most.
        ranks: what several processes would share.
        steps: optimizer steps of all rounds and clients.
        traffic: of a client with an adapter of this layout.
        up: bytes sent in a round by all its clients, at least and at most.
        down: bytes sent to them.
        spent: the most that any client's data will have spent of privacy.
        memory: None if this backbone's code asks for numbers, which a plan has not got.
        spilled: bytes that each process will want for rows that memory has no room to remember, in
            a file without a name; it gets what leaves half of the disk's room free.
    """

    device: torch.device
    dtype: torch.dtype
    parameters: int
    weights: int
    quantization: str
    layout: AdapterLayout
    smaller: bool
    clients: tuple[ClientPlan, ...]
    in_round: tuple[int, int]
    ranks: str
    steps: int
    traffic: Traffic
    up: tuple[int, int]
    down: tuple[int, int]
    spent: ClientSpent
    memory: Memory | None
    disk: Disk
    spilled: int


def make_plan(
    loaded: LoadedRecipe,
    rows_by_client: Mapping[str, ClientRows],
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plan a run of a recipe that was checked. Reads no weights, trains nothing, writes nothing.

    Raises:
        PflError: the run would be refused: a client without supervised tokens, a module that is
            not there, a backbone that is none.
    """
    recipe = loaded.recipe
    accelerator = Accelerator()
    device = accelerator.device
    dtype = pick_dtype(recipe.backbone.dtype, device)
    source = find_source(recipe.backbone, say)
    task = task_of(recipe, rows_by_client)
    outline = outline_backbone(source, recipe.backbone, dtype, device, task)
    backbone = outline.backbone
    parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
    with torch.device("meta"):
        adapter = Adapter(
            backbone,
            recipe.largest_adapter,
            seed=0,
            gradient_checkpointing=recipe.training.gradient_checkpointing,
        )
    n_rows = rows_to_train(rows_by_client)
    dataset = FederatedDataset.build(
        rows_by_client,
        backbone.tokenizer,
        *recipe.data.length,
        recipe.own_lengths(n_rows),
        task,
    )
    own = {client: recipe.own(client, n_rows[client]) for client in dataset.client_ids}
    process = process_bytes()  # before the rehearsal, which a run does not need

    layout = adapter.layout
    layouts = own_layouts(layout, recipe, own)
    setup = Setup(
        layout,
        len(dataset),
        recipe.seed,
        recipe.training,
        recipe.aggregation,
        layouts=layouts,
        rates=own_rates(recipe, own),
    )
    method = METHODS[recipe.method.name](recipe.method, setup)
    traffic = count_traffic(method, layout, recipe.federation.rounds)
    some = {each: client for client, each in layouts.items()}  # one client of each layout
    by_layout = {
        each: count_traffic(method, each, recipe.federation.rounds, client)
        for each, client in some.items()
    }
    of_client = {c: by_layout.get(setup.layout_of(c), traffic) for c in dataset.client_ids}
    clients = tuple(
        _client(client, recipe, own[client.id], method.fits, n_rows[client.id])
        for client in dataset
    )
    steps = {client.id: client.steps for client in clients}
    taking_part = Cohorts.of(recipe, {client.id: client.n_train for client in dataset}).all()
    sizes = [len(chosen) for chosen in taking_part]
    blocks = _rehearsed(adapter, _shapes(recipe, dataset), device, recipe.task, say)
    trunk = _trunk(adapter, recipe, dataset)
    converted = outline.stored != dtype or recipe.backbone.quantization != "none"
    memory = None
    if blocks is not None:
        memory = Memory(
            process=process,
            weights=outline.weights,
            file=parameters * outline.stored.itemsize if converted else 0,
            unpacked=outline.unpacked,
            vectors=vector_bytes(recipe, layout, traffic, max(sizes)),
            trunk=min(trunk, MOST_BYTES),
            blocks=blocks,
            on_host=device.type == "cpu",
        )
    return Plan(
        device=device,
        dtype=dtype,
        parameters=parameters,
        weights=outline.weights,
        quantization=recipe.backbone.quantization,
        layout=layout,
        smaller=bool(layouts),
        clients=clients,
        in_round=_least_and_most(sizes),
        ranks=planned(
            recipe.runtime.parallel,
            accelerator.num_processes,
            sizes,
            rows=recipe.task == "causal_lm",
        ),
        steps=sum(steps[client] for chosen in taking_part for client in chosen),
        traffic=traffic,
        up=(
            min(sum(min(of_client[c].ups) for c in chosen) for chosen in taking_part),
            max(sum(of_client[c].up for c in chosen) for chosen in taking_part),
        ),
        down=_least_and_most([sum(of_client[c].down for c in chosen) for chosen in taking_part]),
        spent=_planned_spending(recipe, clients, taking_part),
        memory=memory,
        disk=planned_disk(
            recipe,
            taking_part,
            of_client,
            {client: FLOAT * setup.layout_of(client).d for client in of_client},
            FLOAT * layout.d,
        ),
        spilled=max(0, trunk - MOST_BYTES) if recipe.runtime.trunk_cache == "auto" else 0,
    )


def _least_and_most(numbers: Sequence[int]) -> tuple[int, int]:
    return min(numbers), max(numbers)


def _trunk(adapter: Adapter, recipe: Recipe, dataset: FederatedDataset) -> int:
    """Return the bytes of what is remembered of every row once all have been trained and scored."""
    if recipe.runtime.trunk_cache == "off":
        return 0
    rows = {
        example.input_ids
        for client in dataset
        for examples in (client.train, client.validation, dataset.test(client.id))
        for example in examples
    }
    return bytes_of_states(adapter.model, adapter.layout.entries, sum(map(len, rows)))


def _client(client: ClientData, recipe: Recipe, own: Own, fits: int, n_rows: int) -> ClientPlan:
    counts = client.counts.values()
    return ClientPlan(
        id=client.id,
        train=len(client.train),
        validation=len(client.validation),
        test=len(client.test_rows),
        tokens=sum(example.n_supervised for example in client.train),
        cut=sum(count.truncated for count in counts),
        dropped=sum(count.dropped for count in counts),
        steps=fits * own.training.steps_for(client.n_train),
        own=recipe.own_differences(client.id, n_rows),
    )


def _planned_spending(
    recipe: Recipe, clients: Sequence[ClientPlan], taking_part: Sequence[Sequence[str]]
) -> ClientSpent:
    """Account for every turn of the run as if it had been taken."""
    lever, rows_in_step = recipe.privacy.record_level, recipe.training.rows_in_step
    told: dict[str, dict[str, float]] = {client.id: {} for client in clients}
    if lever is not None:
        sigma = lever.noise_multiplier
        told = {c.id: noted(sigma, c.train, rows_in_step, c.steps) for c in clients}
    turns = [(client, told[client]) for chosen in taking_part for client in chosen]
    return largest(spent_by_client(turns, recipe.privacy, told))


def _rehearsed(
    adapter: Adapter,
    shapes: tuple[Shape, Shape],
    device: torch.device,
    task: TaskName,
    say: Callable[[str], None],
) -> Rehearsal | None:
    try:
        return rehearse(adapter.model, *shapes, device, task)
    except RuntimeError as error:  # whatever a fake tensor cannot do is one
        say(f"no estimate of memory: {str(error).strip().splitlines()[0][:200]}")
        return None


def _shapes(recipe: Recipe, dataset: FederatedDataset) -> tuple[Shape, Shape]:
    """Return the largest batch of training and of scoring."""
    training = recipe.training
    train = [(client.train, training.per_device_train_batch_size) for client in dataset]
    scored = [
        (examples, training.per_device_eval_batch_size)
        for client in dataset
        for examples in (client.validation, dataset.test(client.id))
    ]
    return _largest(train), _largest(scored)


def _largest(batches: Sequence[tuple[Sequence[Example], int]]) -> Shape:
    shapes = [
        Shape(
            min(size, len(examples)),
            max(len(example.input_ids) for example in examples),
            max(example.n_supervised for example in examples),
        )
        for examples, size in batches
        if examples
    ]
    return max(shapes, key=lambda shape: shape.rows * shape.tokens)

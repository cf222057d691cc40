"""``pfl-lm plan``: what a run would be, before anything is loaded or written."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pfl_lm.cli.exits import label, plain
from pfl_lm.preflight import check_recipe

if TYPE_CHECKING:
    from pfl_lm.plan import ClientPlan, Plan

MOST_CLIENTS = 20
"""How many clients have a line of their own; the totals are of all."""

MOST_FILES = 60


def plan(recipe: Path, overrides: list[str]) -> None:
    """Check a recipe, count what a run of it would take, and print that.

    Raises:
        PflError: the run would be refused, for whatever reasons that can be known beforehand.
    """
    console = Console(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")

    def say(text: str) -> None:
        console.print(Text(plain(text)))

    checked = check_recipe(recipe, overrides)
    loaded = checked.loaded
    say(f"{loaded.recipe.name}: {loaded.recipe.method.name}, into {loaded.run_folder}")

    from pfl_lm.plan import make_plan

    the_plan = make_plan(loaded, checked.clients, say)
    say(f"\n{loaded.path}, with every default filled in:\n")
    for line in loaded.resolved().splitlines():
        say(f"  {line}")
    console.print()
    console.print(_clients(the_plan.clients))
    say("tokens: the supervised ones of the train rows. cut, dropped: train and validation rows at")
    say(f"data.max_length {loaded.recipe.data.max_length}. steps: optimizer steps of one round")
    for note in checked.notes:
        say(note)
    say("")
    for name, value in _facts(the_plan):
        say(f"{name:<10} {value}")
    if told := loaded.recipe.aggregation.bears_none(max(the_plan.in_round)):
        say(f"\n{told}")
    say(f"\nwould write, under {loaded.run_folder}:")
    for path in the_plan.disk.files[:MOST_FILES]:
        say(f"  {path}")
    if len(the_plan.disk.files) > MOST_FILES:
        say(f"  and {len(the_plan.disk.files) - MOST_FILES} more")
    say(
        "\nNothing was written. Next: "
        + shlex.join(["pfl-lm", "finetune", str(recipe), *overrides])
    )


def size(n: int) -> str:
    """Return bytes as a person says them, in powers of ten and three digits."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if n >= 10**power:
            return f"{float(f'{n / 10**power:.3g}'):g} {unit}"
    return f"{n} bytes"


def _clients(clients: tuple[ClientPlan, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("client", overflow="fold")
    names = ("train", "validation", "test", "tokens", "cut", "dropped", "steps")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    if any(client.own for client in clients):
        table.add_column("its own", overflow="fold")
    for client in clients[:MOST_CLIENTS]:
        numbers = [f"{getattr(client, name):,}" for name in names]
        own = [client.own] if client.own else []
        table.add_row(Text(label(client.id)), *numbers, *own)
    if len(clients) > MOST_CLIENTS:
        table.add_row(f"and {len(clients) - MOST_CLIENTS} more")
    table.add_section()
    totals = [f"{sum(getattr(client, name) for client in clients):,}" for name in names]
    table.add_row("all", *totals)
    return table


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield a name and what there is to say, one line each."""
    traffic, disk = plan.traffic, plan.disk
    kept = str(plan.dtype).removeprefix("torch.")
    if plan.quantization != "none":
        kept = f"{plan.quantization} and {kept}"
    yield (
        "backbone",
        f"{plan.parameters:,} parameters, {size(plan.weights)} as {kept}, on {plan.device}",
    )
    yield (
        "adapter",
        f"{plan.layout.d:,} parameters, {size(4 * plan.layout.d)}, "
        f"on {len(plan.layout.pairs)} matrices{'; of the largest' if plan.smaller else ''}",
    )
    yield (
        "state",
        f"{'up to ' if plan.smaller else ''}{size(sum(traffic.state.values()))} a client stays "
        f"with it: {', '.join(traffic.state)}",
    )
    least, most = plan.in_round
    in_round = f"{most}" if least == most else f"{least} to {most}"
    up, down = _up_to(*plan.up), _up_to(*plan.down)
    yield (
        "traffic",
        f"{up} up and {down} down a round, {in_round} of {len(plan.clients)} clients",
    )
    yield "work", f"{plan.steps:,} optimizer steps in all"
    yield "ranks", plan.ranks
    yield from _privacy(plan)
    yield from _memory(plan)
    yield (
        "disk",
        f"about {size(disk.at_end)} of tensors at the end, {size(disk.at_most)} at most, "
        f"in {len(disk.files)} files",
    )
    if plan.spilled:
        yield "", f"up to {size(plan.spilled)} more while it runs: rows that memory cannot remember"


def _up_to(least: int, most: int) -> str:
    return size(most) if least == most else f"{size(least)} to {size(most)}"


def _privacy(plan: Plan) -> Iterator[tuple[str, str]]:
    from pfl_lm.privacy.spent import said

    levers = (("rows", plan.spent.record_level), ("clients", plan.spent.client_level))
    told = [f"{what}, {said(spent)}" for what, spent in levers if spent is not None]
    if told:
        yield "privacy", f"{'; '.join(told)}: the most of any client, after all rounds"


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    memory = plan.memory
    if memory is None:
        return
    process = (memory.process, "Python, libraries, tokenizer and data: measured here")
    backbone = (memory.weights, "the backbone")
    loading = [process, backbone, (memory.file, "its file, while it is read")]
    working = [
        backbone,
        (memory.vectors, "adapter, optimizer, the method's vectors, a round's uploads"),
        (memory.unpacked, "its largest quantized matrix, while it is multiplied by"),
        (memory.trunk, "rows below the first adapted layer, remembered"),
        (memory.small, "what the layers keep for the backward pass"),
        (memory.large, "large blocks: copies of the logits, above all"),
    ]
    if not memory.on_host:
        yield "memory", f"about {size(memory.on_device)} at the peak on {plan.device}:"
        yield from _parts(working)
    where = "" if memory.on_host else " on this machine"
    yield "memory", f"about {size(memory.host)} at the peak{where}, an estimate, each process:"
    yield from _parts(loading if memory.loading > memory.working else [process, *working])


def _parts(parts: list[tuple[int, str]]) -> Iterator[tuple[str, str]]:
    for n, what in parts:
        if n == 0:
            continue
        yield "", f"{size(n):>8}  {what}"

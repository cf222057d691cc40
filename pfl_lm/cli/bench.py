"""``pfl-lm bench``: how close training comes to the machine's limit, and to loops by hand."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from pfl_lm.cli.exits import plain
from pfl_lm.cli.interrupts import Interrupts
from pfl_lm.cli.run import run_console
from pfl_lm.errors import PflError
from pfl_lm.files import explained, write_atomically
from pfl_lm.preflight import check_recipe
from pfl_lm.recipe.shipped import shipped

if TYPE_CHECKING:
    from pfl_lm.bench.case import Case
    from pfl_lm.bench.results import Bench
    from pfl_lm.bench.ways import Way
    from pfl_lm.recipe import LoadedRecipe

QUICKSTART = "quickstart"
QUICK_REPEATS, QUICK_STEPS = 2, 2


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; ``against`` as it was typed."""

    repeats: int
    steps: int | None
    against: Sequence[str]
    json: Path | None
    quick: bool
    memory: bool


def bench(recipe: Path | None, overrides: list[str], asked: Asked) -> None:
    """Take a client's turn each way, again and again, and show what each of them costs.

    Raises:
        PflError: the recipe, its data or its backbone cannot be used, or what is asked for is not
            there.
        Interrupted: it was stopped by SIGINT or SIGTERM.
    """
    console = run_console()

    def say(text: str) -> None:
        console.print(Text(plain(text)))

    if recipe is not None and "=" in str(recipe) and not recipe.exists():
        recipe, overrides = None, [str(recipe), *overrides]
    path = shipped(QUICKSTART) if recipe is None else recipe
    if asked.json is not None:
        refuse_no_place(asked.json)
    checked = check_recipe(path, overrides, to_run=False)

    from pfl_lm.bench.ways import asked_ways, read_against

    against = read_against(asked.against)
    with Interrupts(say), TemporaryDirectory(dir=_disk(checked.loaded), prefix=".bench-") as folder:
        case = _load(checked.loaded, checked.clients, asked, Path(folder), say)
        ways = asked_ways(case, against)
        say(_about(case, checked.loaded))
        found = _measured(case, ways, asked, console)
        if asked.memory and not asked.quick:
            _add_peaks(found, case, ways, path, overrides, against, console)
    from pfl_lm.cli.bench_tables import lines, tables

    for table in tables(found):
        console.print(table)
    for line in lines(found):
        say(line)
    if asked.json is not None:
        from pfl_lm.bench.ways import OURS

        typed = {"path": str(path), "overrides": overrides}
        text = json.dumps({**typed, **found.to_json(OURS)}, ensure_ascii=False, indent=1)
        with explained(asked.json):
            write_atomically(asked.json, f"{text}\n".encode())
        say(f"All numbers are in {asked.json}.")
    say(f"Next: {shlex.join(['pfl-lm', 'plan', str(path), *overrides])}")


def refuse_no_place(file: Path) -> None:
    """Check that a file can be written, before minutes are spent on what is to be in it.

    Raises:
        PflError: it is a folder, or the folder it should be in is not there or not writable.
    """
    if file.is_dir():
        raise PflError(f"--json: {file} is a folder", hint=f"--json {file / 'bench.json'}")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise PflError(
            f"--json: {file} cannot be written, {file.parent} is no folder that can be written to"
        )


def _disk(loaded: LoadedRecipe) -> Path:
    """Return the folder nearest to where a run would write, so that its disk is measured."""
    above = next(each for each in loaded.run_folder.parents if each.is_dir())
    return above if os.access(above, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _load(
    loaded: LoadedRecipe, clients: Any, asked: Asked, folder: Path, say: Callable[[str], None]
) -> Case:
    from accelerate import Accelerator

    from pfl_lm.bench.case import load_case
    from pfl_lm.federation.fleet.start import set_threads

    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise PflError(
            f"bench measures one process, and this is one of {accelerator.num_processes}",
            hint="start it without torchrun",
        )
    set_threads(loaded.recipe.runtime, accelerator)
    say(f"loading the backbone onto {accelerator.device}")
    case = load_case(loaded, clients, accelerator.device, folder, steps=asked.steps, say=say)
    if asked.quick and case.steps > QUICK_STEPS:
        return replace(case, steps=QUICK_STEPS)
    return case


def _about(case: Case, loaded: LoadedRecipe) -> str:
    import torch

    recipe = case.recipe
    dtype = str(case.backbone.dtype).removeprefix("torch.")
    layers = recipe.adapter.layers_to_transform
    where = "all layers" if layers is None else f"{len(layers)} layer{'s' * (len(layers) != 1)}"
    threads = torch.get_num_threads()
    return (
        f"{recipe.name}: a turn of {recipe.method.name}, {case.steps} steps of "
        f"{recipe.training.rows_in_step} rows of {case.client}, adapters in {where}; "
        f"{dtype} on {case.device}, {threads} thread{'s' * (threads != 1)}"
    )


def _measured(case: Case, ways: Sequence[Way], asked: Asked, console: Console) -> Bench:
    from pfl_lm.bench.measure import measure

    repeats = QUICK_REPEATS if asked.quick else asked.repeats
    with _progress(console, (repeats + 1) * len(ways)) as did:
        return measure(case, ways, repeats=repeats, did=lambda way: did(way.name))


def _add_peaks(
    found: Bench,
    case: Case,
    ways: Sequence[Way],
    path: Path,
    overrides: Sequence[str],
    against: Sequence[str],
    console: Console,
) -> None:
    import torch

    from pfl_lm.bench.memory import peaks

    with _progress(console, len(ways)) as did:
        measured = peaks(
            path,
            overrides,
            {way.name: way.resident for way in ways},
            case.disk,
            against=against,
            steps=case.steps,
            threads=torch.get_num_threads(),
            did=lambda name: did(f"memory of {name}"),
        )
    for name, peak in measured.items():
        found.ways[name].peak = peak


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Show how much is done and about how long the rest takes; gives what is told of each part."""
    from pfl_lm.cli.display import duration, live_line

    began, done = time.perf_counter(), 0
    with live_line(console) as line:
        task = line.add_task("the first turns", total=total, left="")

        def did(name: str) -> None:
            nonlocal done
            done += 1
            left = (time.perf_counter() - began) / done * (total - done)
            text = f"about {duration(left)} left"
            line.update(task, completed=done, description=plain(name), left=text)

        yield did

"""How this run was started: how many processes, on which device, with how many threads."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from pfl_lm.errors import DismissedError, PflError
from pfl_lm.federation.fleet.links import PATIENCE, connected

if TYPE_CHECKING:
    from pfl_lm.recipe import BackboneOptions, RuntimeOptions

Made = TypeVar("Made")

_TWO_RANKS = (
    "torchrun --nproc-per-node 2 -m pfl_lm finetune RECIPE "
    "(on CPUs with ACCELERATE_USE_CPU=true before it)"
)


def join_ranks(runtime: RuntimeOptions) -> Accelerator:
    """Join the job this process is part of, be it alone; Accelerate names rank and device.

    Raises:
        PflError: ranks were asked for, and there is one process.
    """
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    if accelerator.num_processes == 1 and runtime.parallel != "auto":
        raise PflError(
            f"runtime.parallel: {runtime.parallel} needs several processes, and this is the only "
            f"one{_launched()}",
            hint=f"start it with  {_TWO_RANKS}",
        )
    if accelerator.num_processes > 1:
        atexit.register(_leave)
    return accelerator


def refuse_spread_over_ranks(backbone: BackboneOptions, accelerator: Accelerator) -> None:
    """Check that no backbone is spread over GPUs of which each belongs to a process.

    Raises:
        PflError: it is.
    """
    n = accelerator.num_processes
    if backbone.device_map is not None and n > 1:
        raise PflError(
            f"backbone.device_map: auto spreads one backbone over all GPUs, and {n} processes "
            "each want one of their own",
            hint="start a single process, without torchrun; or leave backbone.device_map out",
        )


def _leave() -> None:
    """End the connection before the interpreter does, which may find its threads at work."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # the others may be gone
            dist.destroy_process_group()


def rank_0_first(accelerator: Accelerator, prepare: Callable[[], Made]) -> Made:
    """Prepare on rank 0, then on the others, which find the files that it has made.

    If it fails on any rank, all end: rank 0 says why, and says it once if many have found the same.

    Raises:
        PflError: on rank 0, what ``prepare`` raised, here or elsewhere.
        DismissedError: on another rank, for it is rank 0 that says why.
        LostRankError: another rank is gone.
    """
    main = accelerator.is_main_process
    made: list[Made] = []
    fault: PflError | None = None
    for turn_of_main in (True, False):
        if main == turn_of_main:
            try:
                made = [prepare()]
            except PflError as error:
                fault = error
        with connected():
            faults = [found for found in gather_object([fault]) if found is not None]
        if faults:
            raise (fault or faults[0]) if main else DismissedError("rank 0 says why")
    return made[0]


def lone_launch() -> str | None:
    """Return what to tell someone whose launcher has silently started one process, or None."""
    if _launched() and os.environ.get("WORLD_SIZE", "1") == "1":
        return f"accelerate launch has started one process; for two ranks type  {_TWO_RANKS}"
    return None


def set_threads(runtime: RuntimeOptions, accelerator: Accelerator) -> None:
    """Set PyTorch's CPU threads: as asked; else all cores if alone, one beside other ranks."""
    alone = accelerator.num_processes == 1
    torch.set_num_threads(runtime.threads or (torch.get_num_threads() if alone else 1))


def _launched() -> str:
    """Return a remark if `accelerate launch` is above us; with --cpu it starts one process."""
    return (
        " (accelerate launch --cpu starts one)"
        if "ACCELERATE_MIXED_PRECISION" in os.environ
        else ""
    )

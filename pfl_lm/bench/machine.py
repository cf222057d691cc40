"""The machine: what it is, what it can do at best, and what a process has held of its memory."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from pfl_lm.bench.clock import now

_ENOUGH = {"cpu": 0.2, "cuda": 0.05, "mps": 0.1}
"""Seconds of multiplying that are measured at least."""

_SIDE = {"cpu": 1024, "cuda": 8192, "mps": 4096}
"""Rows and columns of the matrices that are multiplied."""


def machine() -> dict[str, str | int | float]:
    """Return what times depend on."""
    packages = ("torch", "lightning", "peft", "transformers")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def device_name(device: torch.device) -> str:
    """Return what a person calls this device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Multiplication:
    """Square matrices multiplied in one type on one device: the most that a machine is asked for.

    Two matrices of n by n take 2 n³ operations. The rate that comes of it is what the largest
    products of a model could reach; smaller ones, and all that is no product, stay below it.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.side = _SIDE.get(device.type, 1024)
        made = torch.Generator().manual_seed(0)
        size = self.side, self.side
        self._a, self._b = (torch.randn(size, generator=made).to(device, dtype) for _ in range(2))
        self._times = 1
        self._burst()
        wall, *_ = self.measured()  # the first products set libraries up
        self._times = max(1, round(_ENOUGH.get(device.type, 0.2) / max(wall, 1e-6)))

    def measured(self) -> tuple[float, float, int]:
        """Multiply for a while; return seconds by wall and cpu, and how many operations."""
        before = now(self.device)
        self._burst()
        after = now(self.device)
        operations = 2 * self.side**3 * self._times
        return after[0] - before[0], after[1] - before[1], operations

    def _burst(self) -> None:
        for _ in range(self._times):
            torch.mm(self._a, self._b)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: on a CUDA device there, else on the machine.

    On Linux the process is asked, not ``getrusage``: that goes on from what the process had held
    that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        [most] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return int(most) * 2**10
    except (OSError, ValueError):
        most_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most_rss * (1 if sys.platform == "darwin" else 2**10)


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from here on, where the system can do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")

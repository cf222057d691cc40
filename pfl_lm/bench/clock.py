"""Taking times side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class Times:
    """Milliseconds of one thing that was done several times, by the wall and by the processor.

    On a machine that others use too, only the processor's time says what the work costs; what a
    disk takes is seen by the wall alone.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, wall: float, cpu: float) -> None:
        """Take in one measurement, in seconds."""
        self.wall.append(1e3 * wall)
        self.cpu.append(1e3 * cpu)

    @property
    def numbers(self) -> dict[str, float]:
        """Medians, the least and the most, in milliseconds."""
        return {
            "wall_median": statistics.median(self.wall),
            "wall_least": min(self.wall),
            "wall_most": max(self.wall),
            "cpu_median": statistics.median(self.cpu),
            "cpu_least": min(self.cpu),
            "cpu_most": max(self.cpu),
            "times": len(self.wall),
        }


def now(device: torch.device | None = None) -> tuple[float, float]:
    """Return seconds by the wall and by this process's processors, once ``device`` has caught up.

    A GPU works behind Python's back: its clock is read when what it was given is done.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device is not None and device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter(), time.process_time()


def alternate(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Do every piece of work in turn, again and again; the first time of each does not count."""
    times = {name: Times() for name in work}
    for i in range(repeats + 1):
        for name, do in work.items():
            wall, cpu = now()
            do()
            wall_after, cpu_after = now()
            if i:
                times[name].add(wall_after - wall, cpu_after - cpu)
    return times


class Stopwatch:
    """Adds up what passes between `start` and `stop`, in seconds, and counts how often.

    Attributes:
        laps: how often it was stopped since the last `reset`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.wall = self.cpu = 0.0
        self.laps = 0
        self._began = (0.0, 0.0)

    def start(self) -> None:
        """Begin a lap."""
        self._began = now(self.device)

    def stop(self) -> None:
        """End the lap."""
        wall, cpu = now(self.device)
        self.wall += wall - self._began[0]
        self.cpu += cpu - self._began[1]
        self.laps += 1

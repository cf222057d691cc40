"""Ctrl-C and SIGTERM, as one exception that passes through whatever is running.

Lightning answers a KeyboardInterrupt inside a fit by leaving the process with exit code 1; an
exception of our own it lets through.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The process was asked to stop."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` on SIGINT or SIGTERM while the body runs.

    Raises:
        Interrupted: one of the two arrived; a second one is ignored while the first is obeyed.
    """
    before = {number: signal.signal(number, _stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name)

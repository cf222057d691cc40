"""Ctrl-C and SIGTERM: the step in progress is finished, then the run stops.

While a run trains or scores, the first signal is remembered and obeyed at the next `check`, after
the step; a second one, or one that comes at any other time, is obeyed at once. Either way what was
committed stays. The exception is one of our own: Lightning answers a KeyboardInterrupt inside a fit
by leaving the process with exit code 1.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The process was asked to stop."""


class Interrupts:
    """Answers SIGINT and SIGTERM while it is entered.

    Attributes:
        patient: whether `check` is called often enough for a signal to wait for it.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.patient = False
        self._say = say
        self._asked: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over."""
        self._before = {number: signal.signal(number, self._answer) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Stop if that was asked for.

        Raises:
            Interrupted: it was.
        """
        if self._asked is not None:
            self._stop(self._asked)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.patient or self._asked is not None:
            self._stop(name)
        self._asked = name
        self._say("stopping after this step; once more to stop at once")

    def _stop(self, name: str) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # while the run is being put away
        raise Interrupted(name)

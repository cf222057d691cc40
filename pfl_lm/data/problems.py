"""A list of what is wrong with the data, reported at once and cut before it floods the screen."""

from __future__ import annotations

from pfl_lm.errors import SHOWN, DataError, listed


class Problems:
    """Problems in the order they were found, of which the first ``SHOWN`` are kept."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, problem: str) -> None:
        """Note one problem: where, what is wrong, what is allowed, on one line."""
        self._count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(problem)

    def raise_if_any(self, where: str, *, hint: str | None = None) -> None:
        """Report every problem noted so far.

        Raises:
            DataError: there is at least one.
        """
        if not self:
            return
        raise DataError(listed(where, self._shown, self._count), hint=hint)

"""What can go wrong for a user, as a handful of exceptions.

Each says where, what is wrong and what is allowed in its message, and what to type in its hint.
The command line prints both and leaves with exit code 2; it shows no traceback unless asked.
"""

from __future__ import annotations

from collections.abc import Sequence


class PflError(Exception):
    """The user's input cannot be used as it is.

    Args:
        message: where, what is wrong (the value), what is allowed.
        hint: what to do or to type, if there is something to say.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class RecipeError(PflError):
    """The recipe, or an override on the command line, is not valid."""


class DataError(PflError):
    """A data file, or a client's share of it, cannot be used."""


class ModelError(PflError):
    """The backbone or its adapter cannot be built as the recipe asks."""


class RunFolderError(PflError):
    """The run folder cannot be written or read, or already holds a run."""


class DivergedError(PflError):
    """A client's training has left the finite numbers."""


class AggregationError(PflError):
    """Uploads do not fit together: lengths, names or weights."""


class ExportError(PflError):
    """An exported adapter did not pass its check, or a run folder does not hold what it says."""


class HubError(PflError):
    """The Hub cannot be reached, or refuses what was asked of it."""


class DismissedError(PflError):
    """Rank 0 has failed and says why; this rank ends with it and has nothing to add."""


class LostRankError(PflError):
    """Another rank of this job is gone."""


class RanksApartError(PflError):
    """Ranks that took a turn together do not hold the same numbers."""


SHOWN = 20
"""How many problems a message lists; of the rest it gives the number."""


def listed(where: str, problems: Sequence[str], n: int | None = None) -> str:
    """Lay out several problems under one heading, one a line, and only so many of them.

    ``n`` is how many there are, if ``problems`` are only the first of them.
    """
    n = len(problems) if n is None else n
    shown = [f"  {problem}" for problem in problems[:SHOWN]]
    if n > len(shown):
        shown.append(f"  ... and {n - len(shown)} more")
    return "\n".join([f"{where}: {n} problem{'s' * (n != 1)}", *shown])

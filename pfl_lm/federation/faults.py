"""Turns that fail: told apart, so that a round can go on without them.

On the client's machine `attempted` turns what a turn raises into a `Fault`; on the server's side
`upload_fault` looks at what was sent. What is wrong with the run itself, a full disk or a lost
rank, is no fault of a turn and passes through.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping

import torch

from pfl_lm.errors import (
    DismissedError,
    LostRankError,
    PflError,
    RanksApartError,
    RunFolderError,
)
from pfl_lm.federation.messages import Assignment, Fault, Update
from pfl_lm.layout import Vector
from pfl_lm.methods import Broadcast, ClientState, ServerState, Upload
from pfl_lm.methods.base import SHARED
from pfl_lm.recipe import TrainingOptions
from pfl_lm.train.share import OtherRankFailedError

LARGEST_STEP = 100.0
"""How many times the length of what is shared an update may be before it is out of proportion."""

DIVERGED = ("not_finite", "out_of_proportion")
"""Kinds of faults that too high a learning rate leads to."""

_MOST_CHARACTERS = 300


State = ClientState | ServerState


class NotFiniteError(ArithmeticError):
    """A turn has led to numbers that are not finite."""


class TooFewClientsError(PflError):
    """A round has had fewer turns than ``federation.min_clients``."""


def attempted(turn: Callable[[Assignment], Update], task: Assignment) -> Update:
    """Return the turn's update, or one that says why there is none.

    Raises:
        RunFolderError: the run's own files cannot be read or written.
        LostRankError, DismissedError, RanksApartError: the run is over.
        OtherRankFailedError: a rank that shares the turn has failed, and says why.
    """
    try:
        return turn(task)
    except (RunFolderError, LostRankError, DismissedError, RanksApartError, OtherRankFailedError):
        raise
    except NotFiniteError as error:
        fault = Fault("not_finite", str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        fault = Fault("memory", _said(error))
    except Exception as error:
        fault = Fault("memory" if _is_out_of_memory(error) else "raised", _said(error))
    if fault.kind == "memory":
        free_memory()
    return Update(run=task.run, round=task.round, client=task.client, fault=fault)


def refuse_not_finite(what: str, vectors: Mapping[str, Vector]) -> None:
    """Make sure that every number is finite.

    Raises:
        NotFiniteError: some are not; the vectors are named.
    """
    wrong = [name for name, vector in vectors.items() if not bool(vector.isfinite().all())]
    if wrong:
        raise NotFiniteError(f"its {what} holds NaN or infinity: {', '.join(sorted(wrong))}")


def refuse_other_kind(what: str, state: State, like: State) -> None:
    """Make sure that a state that was read has what this method and adapter have in one.

    Raises:
        RunFolderError: names or lengths differ.
    """
    vectors = {name: len(vector) for name, vector in state.vectors.items()}
    expected = {name: len(vector) for name, vector in like.vectors.items()}
    if vectors != expected or state.scalars.keys() != like.scalars.keys():
        raise RunFolderError(
            f"{what}: not a state of this run's method and adapter",
            hint="the ledger or the file was changed; put back a copy of the run folder",
        )


def longest_update(server: ServerState) -> float:
    """Return how far an upload may lie from what it answers, in a round that starts from here.

    That is ``LARGEST_STEP`` times the length of all weights the server shares, both factors of them
    where it has both: far beyond any training, and near enough that one client cannot end the run
    for all.
    """
    shared = (vector for name, vector in server.vectors.items() if name.startswith(SHARED))
    return LARGEST_STEP * math.sqrt(math.fsum(float(v.double().square().sum()) for v in shared))


def upload_fault(sent: Broadcast, upload: Upload, most: float) -> Fault | None:
    """Return what is wrong with an upload that no honest turn can have led to, or None.

    Every number must be finite. A vector ``X`` that answers a vector ``global_X`` that was sent
    must have its shape and lie within ``most`` of it; ``most`` of 0 says nothing of lengths.
    """
    try:
        refuse_not_finite("upload", upload.vectors)
    except NotFiniteError as error:
        return Fault("not_finite", str(error))
    if not math.isfinite(upload.weight) or upload.weight < 0:
        return Fault("not_finite", f"its weight is {upload.weight}")
    for name, number in upload.scalars.items():
        if not math.isfinite(number):
            return Fault("not_finite", f"its {name} is {number}")
    for name, vector in upload.vectors.items():
        if (shared := sent.vectors.get(f"{SHARED}{name}")) is not None and (
            said := _out_of_proportion(vector, shared, most)
        ):
            return Fault("out_of_proportion", said)
    return None


def _out_of_proportion(vector: Vector, shared: Vector, most: float) -> str | None:
    if vector.shape != shared.shape:
        return f"it sent {tuple(vector.shape)} numbers where {tuple(shared.shape)} are due"
    length = float((vector.double() - shared.double()).norm())
    if length > most > 0:
        return f"its update is {length:.3g} long, the most is {most:.3g}"
    return None


def in_smaller_batches(training: TrainingOptions) -> TrainingOptions:
    """Return options with micro-batches of at most half the rows, and the same optimizer steps.

    Batches of one row stay as they are.
    """
    rows = training.per_device_train_batch_size
    smaller = max((n for n in range(1, rows // 2 + 1) if rows % n == 0), default=rows)
    accumulation = training.gradient_accumulation_steps * (rows // smaller)
    return training.model_copy(
        update={
            "per_device_train_batch_size": smaller,
            "gradient_accumulation_steps": accumulation,
        }
    )


def free_memory() -> None:
    """Give back what a turn that ran out of memory still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch's CPU allocator and MPS raise plain RuntimeErrors."""
    said = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in said or "not enough memory" in said
    )


def _said(error: BaseException) -> str:
    what = str(error) if isinstance(error, PflError) else f"{type(error).__name__}: {error}"
    return " ".join(what.split())[:_MOST_CHARACTERS]

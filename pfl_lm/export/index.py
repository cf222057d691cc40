"""``adapters.json``: what was exported for whom, and why. Written once, read strictly.

A run folder may come from anybody, so its reader believes nothing: unknown keys, other types, slugs
that are not slugs and files that are too large are refused. No torch here.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from pfl_lm.errors import ExportError
from pfl_lm.recipe.scalars import brief
from pfl_lm.recipe.task import MOST_LABELS, TaskName
from pfl_lm.sealed import read_sealed

NAME = "adapters.json"
BASE = "base"
"""The candidate that is the untouched backbone, as ``pfl_lm.evaluate`` names it."""
MAX_BYTES = 64 * 2**20


def _one_line(text: str) -> str:
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        raise ValueError("must be one line of text, without control characters")
    return text


Prompts = Literal["chat", "text"]
Split = Literal["validation", "test"]
Line = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,80}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class RunEntry(_Strict):
    """The run as a whole: rounds, how long one client's turn in a round is, how it was prompted.

    ``task`` and ``labels`` are written for other tasks than causal_lm only, and for classes.
    """

    name: RunName
    method: Name
    rounds: Count
    turn: Line
    prompts: Prompts
    task: TaskName = "causal_lm"
    labels: Annotated[list[Line], Field(max_length=MOST_LABELS)] | None = None

    @model_serializer(mode="wrap")
    def _short(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain = {"task": "causal_lm", "labels": None}
        content: dict[str, Any] = written(self)
        return {k: value for k, value in content.items() if k not in plain or value != plain[k]}

    @model_validator(mode="after")
    def _labels_of_classes(self) -> Self:
        if (self.task == "sequence_classification") != bool(self.labels):
            raise ValueError("labels are there for classes, and only for them")
        return self


class BaseEntry(_Strict):
    """The backbone: a Hub id, or the folder it was loaded from."""

    model_name_or_path: str | None
    revision: str | None
    dtype: Name


class RowCounts(_Strict):
    """How many rows a client had."""

    train: Count
    validation: Count
    test: Count


class ClientEntry(_Strict):
    """One client's adapter: which candidate it is and why.

    ``scores`` are nats a supervised token by split, then candidate; None where it is not finite.
    ``sha256`` is that of ``adapter_model.safetensors``.
    """

    slug: Slug
    candidate: Name
    reason: Line
    rows: RowCounts
    scores: dict[Split, dict[Name, float | None]]
    sha256: Sha256


class AdapterIndex(_Strict):
    """The whole file; ``clients`` by id."""

    format: Literal[1]
    run: RunEntry
    base: BaseEntry
    clients: Annotated[dict[Line, ClientEntry], Field(min_length=1)]

    @model_validator(mode="after")
    def _slugs_differ(self) -> Self:
        if len({entry.slug for entry in self.clients.values()}) < len(self.clients):
            raise ValueError("two clients have the same slug")
        return self

    def text(self) -> bytes:
        """Return the file's content: sorted keys, two spaces, UTF-8."""
        import json

        content = self.model_dump(mode="json")
        return (json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def read_index(run_folder: Path) -> AdapterIndex:
    """Read and check the ``adapters.json`` of a finished run.

    Raises:
        ExportError: it is not there, or is not what pfl-lm writes.
        RunFolderError: it is a link, too large or unreadable.
    """
    where = run_folder / NAME
    try:
        there = run_folder.is_dir()
    except OSError as error:
        raise ExportError(f"{run_folder}: cannot be looked at ({error.strerror})") from None
    if not there:
        raise ExportError(
            f"{run_folder}: there is no such folder", hint="name a run: <runtime.output_dir>/<name>"
        )
    if not os.path.lexists(where):
        raise ExportError(
            f"{run_folder}: no {NAME} in it, so it is not the folder of a finished run",
            hint="name a run: <runtime.output_dir>/<name>; a run that was stopped has no adapters",
        )
    return parse_index(read_sealed(run_folder, NAME, MAX_BYTES), str(where))


def parse_index(content: bytes, where: str) -> AdapterIndex:
    """Check the content of an ``adapters.json``.

    Raises:
        ExportError: it is not what pfl-lm writes; the first thing that is wrong.
    """
    try:
        return AdapterIndex.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(brief(str(part)) for part in first["loc"]) or "the file"
        raise ExportError(
            f"{where}: not an index of adapters as this version writes it: {at}: {first['msg']}",
            hint="run the recipe again with this version, or put the file back as it was written",
        ) from None

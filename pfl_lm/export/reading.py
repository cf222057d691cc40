"""An exported adapter, read back from a run folder that may have been changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load

from pfl_lm.errors import ExportError
from pfl_lm.export.index import ClientEntry
from pfl_lm.export.outgoing import MAX_WEIGHTS_BYTES, WEIGHTS
from pfl_lm.layout import Vector
from pfl_lm.model.adapter import Adapter
from pfl_lm.sealed import read_sealed


def exported_vector(run_folder: Path, entry: ClientEntry, adapter: Adapter) -> Vector:
    """Return the numbers of a client's exported adapter, ``(d,)``; ``adapter`` is left alone.

    Raises:
        ExportError: the file is not the one that the index names, or no adapter of this run.
        RunFolderError: it is missing, unreadable or a link.
    """
    name = f"adapters/{entry.slug}/{WEIGHTS}"
    content = read_sealed(run_folder, name, MAX_WEIGHTS_BYTES)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ExportError(
            f"{run_folder / name}: not the adapter that adapters.json names (SHA-256 differs)",
            hint="take the file as the run wrote it, or run the recipe again",
        )
    try:
        vector = adapter.vector(load(content))
    except SafetensorError as error:
        raise ExportError(f"{run_folder / name}: no safetensors file: {error}") from None
    except ExportError as error:
        raise ExportError(f"{run_folder / name}: {error.message}") from None
    if not bool(vector.isfinite().all()):
        raise ExportError(f"{run_folder / name}: holds numbers that are not finite")
    return vector

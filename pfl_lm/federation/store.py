"""State on disk: safetensors files whose names carry their round.

A file is written and synced before the ledger's row that names it; the row is the commit. A file
that no row names is as good as absent. Numbers beside the tensors are JSON in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from pfl_lm.errors import RunFolderError
from pfl_lm.federation.messages import StateFile
from pfl_lm.files import explained, write_atomically
from pfl_lm.layout import Vector
from pfl_lm.methods import ClientState, ServerState, Upload


class Store:
    """The tensors of one run folder.

    Args:
        run_folder: ``<runtime.output_dir>/<name>``.
        slugs: the folder name of each client.
        device: where loaded vectors go.
    """

    def __init__(self, run_folder: Path, slugs: Mapping[str, str], device: torch.device) -> None:
        self.run_folder = run_folder
        self.slugs = slugs
        self.device = device

    def save_client(self, client: str, round: int, state: ClientState) -> StateFile:
        """Write a client's private state of one round."""
        path = f"clients/{self.slugs[client]}/state-{round}.safetensors"
        return self._write(path, state.vectors, state.scalars)

    def load_client(self, file: StateFile) -> ClientState:
        """Read a client's state back, checked against its row."""
        return ClientState(*self._read(file))

    def save_server(self, round: int, state: ServerState) -> StateFile:
        """Write the server's state of one round."""
        path = f"server/state-{round}.safetensors"
        return self._write(path, state.vectors, state.scalars)

    def save_upload(self, client: str, round: int, upload: Upload) -> StateFile:
        """Write what a client sent, until the round is aggregated."""
        path = f"uploads/{round}/{self.slugs[client]}.safetensors"
        return self._write(path, upload.vectors, {**upload.scalars, "weight": upload.weight})

    def discard(self, paths: list[str]) -> None:
        """Remove files that a newer commit has replaced, and folders this leaves empty."""
        for name in paths:
            path = self.run_folder / name
            with explained(path):
                path.unlink(missing_ok=True)
                folder = path.parent
                while folder != self.run_folder and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
                    folder = folder.parent

    def _write(
        self, path: str, vectors: Mapping[str, Vector], scalars: Mapping[str, float]
    ) -> StateFile:
        tensors = {name: vector.detach().cpu().contiguous() for name, vector in vectors.items()}
        # One entry: safetensors writes several in an order that changes from call to call.
        content = save(tensors, metadata={"scalars": json.dumps(scalars, sort_keys=True)})
        return StateFile(path, write_atomically(self.run_folder / path, content))

    def _read(self, file: StateFile) -> tuple[dict[str, Vector], dict[str, float]]:
        path = self.run_folder / file.path
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != file.sha256:
                raise RunFolderError(
                    f"{path}: not the file that the ledger names (SHA-256 differs)"
                )
            vectors = {name: v.to(self.device) for name, v in load(content).items()}
            size = int.from_bytes(content[:8], "little")
            scalars = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["scalars"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise RunFolderError(f"{path}: cannot be read: {error}") from error
        return vectors, scalars

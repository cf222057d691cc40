"""State on disk: safetensors files whose names carry their round.

A file is written and synced before the ledger's row that names it; the row is the commit. A file
that no row names is as good as absent. Numbers beside the tensors are JSON in the file's metadata.

What a turn leaves is written behind the next one, where the run has a thread for it: its state, its
upload and then its row, so that a process that ends has done them in this order or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from pfl_lm.errors import RunFolderError, listed
from pfl_lm.federation.behind import Behind
from pfl_lm.federation.folder import FOLDERS, STATES, UNFINISHED, UPLOADS
from pfl_lm.federation.history import StateFile
from pfl_lm.files import explained, write_atomically
from pfl_lm.layout import Vector
from pfl_lm.methods import ClientState, ServerState, Upload
from pfl_lm.sealed import open_sealed, read_sealed

MOST_BYTES = 2**36
MOST_HEADER = 2**20


class Store:
    """The tensors of one run folder.

    Args:
        run_folder: ``<runtime.output_dir>/<name>``.
        slugs: the folder name of each client.
        device: where loaded vectors go.
        behind: who writes what a turn leaves; None to have it written at once.
    """

    def __init__(
        self,
        run_folder: Path,
        slugs: Mapping[str, str],
        device: torch.device,
        behind: Behind | None = None,
    ) -> None:
        self.run_folder = run_folder
        self.slugs = slugs
        self.device = device
        self._behind = behind

    def then(self, job: Callable[[], object]) -> None:
        """Do something once all that was saved before is on disk, as a row that names it."""
        if self._behind is None:
            job()
        else:
            self._behind.do(job)

    def settle(self) -> None:
        """Wait until all that was saved is on disk, and what was to be done then is done.

        Raises:
            RunFolderError: something could not be written.
        """
        if self._behind is not None:
            self._behind.settle()

    def save_client(self, client: str, round: int, state: ClientState) -> StateFile:
        """Write a client's private state of one round, once the turn before is on disk."""
        self.settle()  # so that no more than one turn is waiting in memory
        path = f"clients/{self.slugs[client]}/state-{round}.safetensors"
        return self._write_behind(path, state.vectors, state.scalars)

    def load_client(self, file: StateFile) -> ClientState:
        """Read a client's state back, checked against its row."""
        return ClientState(*self._read(file))

    def save_server(self, round: int, state: ServerState) -> StateFile:
        """Write the server's state of one round."""
        path = f"server/state-{round}.safetensors"
        return self._write(path, state.vectors, state.scalars)

    def load_server(self, file: StateFile) -> ServerState:
        """Read the server's state back, checked against its row."""
        return ServerState(*self._read(file))

    def save_upload(self, client: str, round: int, upload: Upload) -> StateFile:
        """Write what a client sent, until the round is aggregated."""
        path = f"uploads/{round}/{self.slugs[client]}.safetensors"
        scalars = {**upload.scalars, "weight": upload.weight}
        return self._write_behind(path, upload.vectors, scalars)

    def load_upload(self, file: StateFile, client: str = "") -> Upload:
        """Read what a client sent, checked against its row."""
        vectors, scalars = self._read(file)
        if "weight" not in scalars:
            raise RunFolderError(f"{self.run_folder / file.path}: an upload without a weight")
        return Upload(vectors, weight=scalars.pop("weight"), scalars=scalars, client=client)

    def load_part(self, file: StateFile, name: str, columns: slice) -> Vector:
        """Read some numbers of one vector and no more of the file, onto the CPU.

        They are not checked: of a file that has changed since it was read whole, they are others.

        Raises:
            RunFolderError: the file cannot be read, or has no such numbers.
        """
        where, n = self._place(file.path), 4 * (columns.stop - columns.start)
        try:
            with open_sealed(self.run_folder, file.path, MOST_BYTES) as (content, _):
                size = int.from_bytes(content.read(8), "little")
                header = json.loads(content.read(min(size, MOST_HEADER)))
                content.seek(8 + size + header[name]["data_offsets"][0] + 4 * columns.start)
                numbers = content.read(n)
        except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RunFolderError(f"{where}: cannot be read: {error}") from error
        if len(numbers) != n:
            raise RunFolderError(f"{where}: changed while it was being read")
        return torch.frombuffer(bytearray(numbers), dtype=torch.float32)

    def discard(self, paths: Iterable[str]) -> None:
        """Remove files that a newer commit has replaced, and folders this leaves empty.

        Raises:
            RunFolderError: one is no file of a run's state, or cannot be removed.
        """
        emptied = set()
        for name in paths:
            path = self._place(name)
            with explained(path):
                path.unlink(missing_ok=True)
            emptied.add(path.parent)
        self._close_up(emptied)

    def check(self, files: Iterable[StateFile]) -> None:
        """Make sure that every file a ledger still needs is there and is the one it names.

        Raises:
            RunFolderError: one is missing, damaged or swapped; all such files are named.
        """
        problems = []
        for file in files:
            try:
                self._content(file)
            except RunFolderError as error:
                problems.append(error.message)
        if problems:
            raise RunFolderError(
                listed(str(self.run_folder), problems),
                hint="put these files back from a copy; without them the run cannot go on",
            )

    def sweep(self, needed: Iterable[StateFile]) -> list[str]:
        """Remove what an interrupted run left half done, and return what that was.

        That is: states and uploads that no row names any more or yet, unfinished files, and
        folders with nothing in them.
        """
        keep = {file.path for file in needed}
        left = [
            path for folder in ("clients/*", "server", "uploads/*") for path in self._in(folder)
        ]
        state = (path for path in left if STATES.fullmatch(path) or UPLOADS.fullmatch(path))
        swept = sorted(set(state) - keep)
        self.discard(swept)
        for folder in (".", "global", *FOLDERS):
            for path in self._in(folder):
                if UNFINISHED.fullmatch(Path(path).name):
                    with explained(self.run_folder / path):
                        (self.run_folder / path).unlink(missing_ok=True)
                    swept.append(path)
        places = (place for folder in FOLDERS for place in self.run_folder.glob(folder))
        self._close_up(place for place in places if not place.is_symlink())
        return swept

    def _close_up(self, folders: Iterable[Path]) -> None:
        """Remove folders of the run that are empty, and those above that this leaves empty."""
        for folder in folders:
            while folder != self.run_folder and folder.is_dir():
                try:
                    folder.rmdir()
                except OSError:
                    with explained(folder):
                        if any(folder.iterdir()):
                            break
                        raise
                folder = folder.parent

    def _in(self, folders: str) -> list[str]:
        """Return the files in some folders, none of them reached through a link."""
        found = self.run_folder.glob(f"{folders}/*" if folders != "." else "*")
        return [
            path.relative_to(self.run_folder).as_posix()
            for path in sorted(found)
            if path.is_file() and not path.is_symlink()
        ]

    def _place(self, name: str) -> Path:
        if not STATES.fullmatch(name) and not UPLOADS.fullmatch(name):
            raise RunFolderError(f"{self.run_folder}: the ledger names {name!r}, no state of a run")
        return self.run_folder / name

    def _write(
        self, path: str, vectors: Mapping[str, Vector], scalars: Mapping[str, float]
    ) -> StateFile:
        content = _content_of(vectors, scalars)
        return StateFile(path, write_atomically(self._place(path), content))

    def _write_behind(
        self, path: str, vectors: Mapping[str, Vector], scalars: Mapping[str, float]
    ) -> StateFile:
        """Return the file that there will be; the vectors are free to change meanwhile."""
        content, place = _content_of(vectors, scalars), self._place(path)
        self.then(lambda: write_atomically(place, content))
        return StateFile(path, hashlib.sha256(content).hexdigest())

    def _content(self, file: StateFile) -> bytes:
        path = self._place(file.path)
        content = read_sealed(self.run_folder, file.path, MOST_BYTES)
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise RunFolderError(f"{path}: not the file that the ledger names (SHA-256 differs)")
        return content

    def _read(self, file: StateFile) -> tuple[dict[str, Vector], dict[str, float]]:
        content = self._content(file)
        try:
            vectors = {name: v.to(self.device) for name, v in load(content).items()}
            size = int.from_bytes(content[:8], "little")
            scalars = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["scalars"])
            _check_kinds(vectors, scalars)
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            where = self.run_folder / file.path
            raise RunFolderError(f"{where}: cannot be read: {error}") from error
        return vectors, scalars


def _content_of(vectors: Mapping[str, Vector], scalars: Mapping[str, float]) -> bytes:
    tensors = {name: vector.detach().cpu().contiguous() for name, vector in vectors.items()}
    # One entry: safetensors writes several in an order that changes from call to call.
    content: bytes = save(tensors, metadata={"scalars": json.dumps(scalars, sort_keys=True)})
    return content


def _check_kinds(vectors: Mapping[str, Vector], scalars: object) -> None:
    wrong = [n for n, v in vectors.items() if v.dtype != torch.float32 or v.dim() != 1]
    if wrong:
        raise ValueError(f"not vectors of float32: {', '.join(sorted(wrong))}")
    if not isinstance(scalars, dict) or not all(type(x) in (int, float) for x in scalars.values()):
        raise ValueError("its scalars are not numbers by name")


class StoredUploads(Sequence[Upload]):
    """A round's uploads, in the order given, each read from disk when it is asked for.

    ``files`` come with whose they are.
    """

    def __init__(self, store: Store, files: Sequence[tuple[str, StateFile]]) -> None:
        self.store = store
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Upload: ...
    @overload
    def __getitem__(self, index: slice) -> StoredUploads: ...
    def __getitem__(self, index: int | slice) -> Upload | StoredUploads:
        """Read one upload, or take some of them without reading any."""
        if isinstance(index, slice):
            return StoredUploads(self.store, self.files[index])
        client, file = self.files[index]
        return self.store.load_upload(file, client)

    def part(self, index: int, name: str, columns: slice) -> Vector:
        """Read some numbers of one upload's vector; see `Store.load_part` for what is checked."""
        return self.store.load_part(self.files[index][1], name, columns)

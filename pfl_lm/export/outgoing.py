"""What a push may send of a run folder: the files of an allow-list, checked, and nothing else.

Of each client's folder only the names below are ever opened. The adapter must have the SHA-256 that
``adapters.json`` has for it; a config that names a folder as its base model goes out without it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pfl_lm.errors import ExportError
from pfl_lm.export.card_text import Place, base_model, hub_id, load_section, with_load_section
from pfl_lm.export.index import AdapterIndex, BaseEntry, ClientEntry
from pfl_lm.sealed import open_sealed, read_sealed

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
MAX_TEXT_BYTES = 64 * 2**20
MAX_WEIGHTS_BYTES = 8 * 2**30


@dataclass(frozen=True, slots=True)
class OutgoingFile:
    """One file on its way: its path in the repository, and both names that git may give it."""

    path: str
    size: int
    sha256: str
    git_sha1: str
    _make: Callable[[], bytes]

    @classmethod
    def of(cls, path: str, make: Callable[[], bytes]) -> OutgoingFile:
        """Read a file once, to know what it is; its content is not kept."""
        content = make()
        blob = b"blob %d\0%b" % (len(content), content)
        git_sha1 = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
        return cls(path, len(content), hashlib.sha256(content).hexdigest(), git_sha1, make)

    def content(self) -> bytes:
        """Read the file again.

        Raises:
            ExportError: it is another one by now.
            RunFolderError: it cannot be read any more.
        """
        content = self._make()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ExportError(f"{self.path}: changed while it was being pushed")
        return content


def choose_clients(index: AdapterIndex, wanted: Sequence[str]) -> list[str]:
    """Return the ids of the clients meant, in id order; all of them if none is named.

    ``wanted`` holds ids or slugs, each by itself or several with commas between them.

    Raises:
        ExportError: one is not in the index.
    """
    by_name = {entry.slug: client for client, entry in index.clients.items()}
    by_name |= {client: client for client in index.clients}
    chosen: set[str] = set()
    for text in wanted:
        for name in [text] if text in by_name else map(str.strip, text.split(",")):
            if name not in by_name:
                near = difflib.get_close_matches(name, by_name, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "adapters.json lists the clients"
                raise ExportError(f"--clients: this run has no client {name!r}", hint=hint)
            chosen.add(by_name[name])
    return sorted(chosen or index.clients)


def client_files(
    run_folder: Path, index: AdapterIndex, client: str, repo: str
) -> list[OutgoingFile]:
    """Return what goes out for one client, its files as they will be in ``repo``.

    Raises:
        ExportError: a file is not the one that the index names.
        RunFolderError: a file is missing, or is a link.
    """
    slug = index.clients[client].slug
    make = partial(_content, run_folder, index, client, repo)
    optional = [name for name in (CARD, *TOKENIZER) if _is_there(run_folder, slug, name)]
    texts = [
        OutgoingFile.of(f"clients/{slug}/{name}", partial(make, name))
        for name in (CONFIG, *optional)
    ]
    weights = _weights(run_folder, index.clients[client], partial(make, WEIGHTS))
    return [texts[0], weights, *texts[1:]]


def portable(index: AdapterIndex, clients: Iterable[str]) -> AdapterIndex:
    """Return the index of some clients only, without a base model that is a folder."""
    base = index.base
    if hub_id(base.model_name_or_path) is None:
        base = BaseEntry(model_name_or_path=None, revision=None, dtype=base.dtype)
    some = {client: index.clients[client] for client in sorted(clients)}
    return index.model_copy(update={"base": base, "clients": some})


def _content(run_folder: Path, index: AdapterIndex, client: str, repo: str, name: str) -> bytes:
    entry = index.clients[client]
    path = f"adapters/{entry.slug}/{name}"
    limit = MAX_WEIGHTS_BYTES if name == WEIGHTS else MAX_TEXT_BYTES
    content = read_sealed(run_folder, path, limit)
    if name == CONFIG:
        return _portable_config(content, run_folder / path)
    if name == CARD:
        place = Place(repo, subfolder=f"clients/{entry.slug}")
        return _with_place(content, load_section(base_model(index), place))
    return content


def _weights(run_folder: Path, entry: ClientEntry, make: Callable[[], bytes]) -> OutgoingFile:
    """Look at an adapter piece by piece, so that a large one is in memory only when it is sent."""
    name = f"adapters/{entry.slug}/{WEIGHTS}"
    sha256, git_sha1 = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
    with open_sealed(run_folder, name, MAX_WEIGHTS_BYTES) as (file, size):
        git_sha1.update(b"blob %d\0" % size)
        while piece := file.read(2**20):
            sha256.update(piece)
            git_sha1.update(piece)
    if sha256.hexdigest() != entry.sha256:
        raise ExportError(
            f"{run_folder / name}: not the adapter that adapters.json names (SHA-256 differs)",
            hint="take the file as the run wrote it, or run the recipe again",
        )
    path = f"clients/{entry.slug}/{WEIGHTS}"
    return OutgoingFile(path, size, entry.sha256, git_sha1.hexdigest(), make)


def _portable_config(content: bytes, where: Path) -> bytes:
    try:
        config = json.loads(content)
        if not isinstance(config, dict):
            raise TypeError
        if hub_id(_text(config.get("base_model_name_or_path"))) is not None:
            return content
        config |= {"base_model_name_or_path": None, "revision": None}
        return (json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError):
        raise ExportError(f"{where}: not a JSON object") from None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _with_place(card: bytes, section: str) -> bytes:
    try:
        return with_load_section(card.decode(), section).encode()
    except UnicodeDecodeError:
        return card


def _is_there(run_folder: Path, slug: str, name: str) -> bool:
    return os.path.lexists(run_folder / "adapters" / slug / name)

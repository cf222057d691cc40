"""Rows in tokens, kept on disk between runs: one file for all rows of a data set.

What a row is in tokens follows from the row, the tokenizer with its chat template, and the rules in
this package for what is supervised. The file's name is a hash of all three, so that a change of any
makes another file. How long a row may be plays no part: rows are kept whole, and cut afterwards.

A file is read only as far as it is what it should be: its size is bounded beforehand, a hash of its
numbers stands in it, and each number is checked. Whatever else is there is made anew, and what
cannot be written is not kept. No torch here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfl_lm.data.content import Content
from pfl_lm.data.examples import Example
from pfl_lm.data.groups import digest
from pfl_lm.errors import RunFolderError
from pfl_lm.files import open_ordinary, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES = 1
"""Raise it when ``render`` makes other tokens or spans of the same row, and old files are left."""

MOST_BYTES = 2**30
"""How much all files may take; beyond it, those that were not used for longest go."""

_ENDING = ".safetensors"
_COLUMNS = ("ids", "lengths", "spans", "counts")


def keep(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    contents: Sequence[Content],
    make: Callable[[], list[Example]],
) -> list[Example]:
    """Return the contents in tokens: as they are kept in ``folder``, or made now and kept there.

    ``make`` makes an example of each content, whole, in order; it may raise what it likes.
    """
    name = _key(tokenizer, contents)
    path = folder / f"{name}{_ENDING}"
    found = _read(path, len(contents), len(tokenizer))
    if found is not None:
        with suppress(OSError):
            os.utime(path)
        return found
    made = make()
    with suppress(RunFolderError, OSError):
        _write(path, made)
    return made


def _key(tokenizer: PreTrainedTokenizerBase, contents: Iterable[Content]) -> str:
    made = hashlib.sha256(tokenizer_sha256(tokenizer).encode())
    for content in contents:
        made.update(digest(type(content).__name__, *content.parts))
    return made.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that says how rows become tokens: vocabulary, template, rules, code."""
    about: list[Any] = [
        RULES,
        # Some templates write the day into the system turn.
        date.today() if "strftime_now" in str(tokenizer.chat_template) else None,
        *(f"{package} {version(package)}" for package in ("transformers", "tokenizers", "jinja2")),
        type(tokenizer).__name__,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        sorted((key, str(value)) for key, value in tokenizer.init_kwargs.items()),
        sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items()),
    ]
    return digest(*map(repr, about)).hex()


def _write(path: Path, examples: Sequence[Example]) -> None:
    import numpy as np
    from safetensors.numpy import save

    spans = [border for example in examples for span in example.spans for border in span]
    columns = {
        "ids": np.array([token for e in examples for token in e.input_ids], dtype=np.int32),
        "lengths": np.array([len(example.input_ids) for example in examples], dtype=np.int32),
        "spans": np.array(spans, dtype=np.int32),
        "counts": np.array([len(example.spans) for example in examples], dtype=np.int32),
    }
    content = save(columns, metadata={"sha256": _sha256(columns)})
    if len(content) > MOST_BYTES:
        return
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o700, parents=True)  # they can be turned back into the rows
    write_atomically(path, content)
    _make_room(path.parent)


def _make_room(folder: Path) -> None:
    """Remove the files that were not used for longest, until what is left is little enough."""
    files = sorted(folder.glob(f"*{_ENDING}"), key=lambda file: file.stat().st_mtime, reverse=True)
    held = 0
    for file in files:
        held += file.stat().st_size
        if held > MOST_BYTES:
            file.unlink(missing_ok=True)


def _read(path: Path, n_rows: int, n_tokens: int) -> list[Example] | None:
    """Return what is kept; None if it is not there or not what it should be."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_ordinary(path) as file:
            if os.fstat(file.fileno()).st_size > MOST_BYTES:
                return None
        with safe_open(path, framework="numpy") as kept:
            if set(kept.keys()) != set(_COLUMNS):
                return None
            columns = {name: kept.get_tensor(name) for name in _COLUMNS}
            told = (kept.metadata() or {}).get("sha256")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    if any(c.dtype.name != "int32" or c.ndim != 1 for c in columns.values()):
        return None
    if told != _sha256(columns) or len(columns["lengths"]) != n_rows:
        return None
    return _examples(columns, n_tokens)


def _sha256(columns: Mapping[str, Any]) -> str:
    made = hashlib.sha256()
    for name in _COLUMNS:
        made.update(f"{name} {len(columns[name])} ".encode() + columns[name].tobytes())
    return made.hexdigest()


def _examples(columns: Mapping[str, Any], n_tokens: int) -> list[Example] | None:
    """Return examples, each with its ids and spans; None if the numbers cannot be any."""
    ids, lengths, spans, counts = (columns[name] for name in _COLUMNS)
    if len(counts) != len(lengths) or any((numbers < 0).any() for numbers in (lengths, counts)):
        return None
    if lengths.sum() != len(ids) or 2 * counts.sum() != len(spans):
        return None
    if len(ids) and not 0 <= ids.min() <= ids.max() < n_tokens:
        return None
    known = list(range(n_tokens))  # equal ids are one object
    examples = []
    token = border = 0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        borders = spans[border : border + 2 * count].tolist()
        pairs = tuple(zip(borders[::2], borders[1::2], strict=True))
        last = 1  # what position 0 is, nothing predicts
        for first, end in pairs:
            if not last <= first < end <= length:
                return None
            last = end
        row = tuple(map(known.__getitem__, ids[token : token + length].tolist()))
        examples.append(Example(row, pairs))
        token, border = token + length, border + 2 * count
    return examples

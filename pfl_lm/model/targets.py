"""Whether an adapter fits a backbone: told by the names of what can be adapted. No torch.

A folder of weights tells its names in the heads of its safetensors files, so that a recipe can be
refused before anything is loaded; the model itself, once it is there, tells them exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pfl_lm.errors import ModelError
from pfl_lm.recipe.scalars import brief

if TYPE_CHECKING:
    from pfl_lm.recipe.sections import AdapterOptions

_SHOWN = 12
_LONGEST_HEAD = 64 * 2**20


_QUERY_AND_VALUE = (("query", "value"), ("q", "v"), ("q_lin", "v_lin"))
"""What BERT, T5 and DistilBERT call what others call q_proj and v_proj."""


def targets_here(targets: Sequence[str], modules: Collection[str]) -> list[str]:
    """Return the targets by the names they have in this backbone.

    ``q_proj`` and ``v_proj``, both and nothing else, stand for queries and values whatever they are
    called.
    """
    leaves = {name.rsplit(".", 1)[-1] for name in modules}
    if sorted(targets) == ["q_proj", "v_proj"] and leaves.isdisjoint(targets):
        return next((list(own) for own in _QUERY_AND_VALUE if leaves.issuperset(own)), [*targets])
    return list(targets)


def refuse_unknown_targets(
    modules: Collection[str],
    n_layers: int | None,
    options: AdapterOptions,
    key: str = "adapter.target_modules",
) -> None:
    """Check that what the adapter is to go into is there.

    Args:
        modules: the names of all modules that can be adapted.
        n_layers: how many layers there are, if that is known.
        options: the adapter.
        key: what the recipe calls the modules.

    Raises:
        ModelError: a target module or a layer does not exist.
    """
    unknown = [
        target
        for target in options.target_modules
        if not any(name == target or name.endswith(f".{target}") for name in modules)
    ]
    if unknown:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in modules} - {"lm_head"})
        raise ModelError(
            f"{key}: {first_few(unknown)} not in this backbone. It has: {', '.join(leaves)}",
            hint=f"for example {key}=[{', '.join(leaves[:2])}]",
        )
    if n_layers is None:
        return  # PEFT itself will say if no such layer is found
    beyond = [n for n in options.layers_to_transform or () if n >= n_layers]
    if beyond:
        raise ModelError(
            f"adapter.layers_to_transform: [{first_few(beyond)}] not in this backbone, "
            f"which has layers 0 to {n_layers - 1}"
        )


def refuse_misfit(
    folder: Path, options: AdapterOptions, key: str = "adapter.target_modules"
) -> None:
    """Check an adapter against a folder of weights, as far as names in files tell.

    Names in files may begin otherwise than in the model, so only their ends are compared; where a
    file cannot be read, nothing is said, since loading it will say more.

    Raises:
        ModelError: a target module or a layer does not exist.
    """
    matrices = [name for path in sorted(folder.glob("*.safetensors")) for name in _matrices(path)]
    if not matrices:
        return
    targets = targets_here(options.target_modules, matrices)
    ends = [target.rsplit(".", 1)[-1] for target in targets]
    options = options.model_copy(update={"target_modules": ends})
    refuse_unknown_targets(matrices, _n_layers(folder), options, key)


def _matrices(path: Path) -> Iterator[str]:
    """Yield the names of a file's matrices within numbered layers, without their `.weight`."""
    head: object = None
    with suppress(OSError, ValueError, RecursionError), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= _LONGEST_HEAD:
            head = json.loads(file.read(length))
    for name, about in head.items() if isinstance(head, dict) else ():
        shape = about.get("shape") if isinstance(about, dict) else None
        within = re.search(r"\.\d+\.", f".{name}")
        if within and name.endswith(".weight") and isinstance(shape, list) and len(shape) == 2:
            yield name.removesuffix(".weight")


def _n_layers(folder: Path) -> int | None:
    with suppress(OSError, ValueError, RecursionError):
        config = json.loads((folder / "config.json").read_bytes())
        n = config.get("num_hidden_layers") if isinstance(config, dict) else None
        return n if isinstance(n, int) else None
    return None


def first_few(items: Sequence[object]) -> str:
    """Return the first few, for a message."""
    shown = ", ".join(brief(repr(item)) for item in items[:_SHOWN])
    return f"{shown} and {len(items) - _SHOWN} more" if len(items) > _SHOWN else shown

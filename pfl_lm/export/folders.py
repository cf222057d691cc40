"""One self-contained PEFT folder per adapter, checked by reading it back.

``adapter_config.json`` has sorted keys and sets as sorted lists, so that its bytes do not depend on
hashing; ``adapter_model.safetensors`` is fp32, its keys without an adapter's name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save

from pfl_lm.errors import ExportError
from pfl_lm.files import write_atomically
from pfl_lm.layout import AdapterLayout, Vector
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import Backbone

if TYPE_CHECKING:
    from pfl_lm.recipe import AdapterOptions


def export_adapter(
    adapter: Adapter,
    vector: Vector,
    backbone: Backbone,
    folder: Path,
    *,
    layout: AdapterLayout | None = None,
    options: AdapterOptions | None = None,
) -> str:
    """Write ``vector`` as a PEFT folder, read it back through PEFT, and return its SHA-256.

    ``layout`` and ``options`` are those of the vector, if it is of a smaller adapter than the
    resident one, which is overwritten. The digest is that of ``adapter_model.safetensors``.

    Raises:
        ExportError: what PEFT reads back differs from what was written, by as much as one bit.
        RunFolderError: the folder cannot be written.
    """
    config = adapter.config_json(backbone.name, backbone.revision, options)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / "adapter_config.json", text.encode())
    content = save(adapter.tensors(vector, layout), metadata={"format": "pt"})
    digest = write_atomically(folder / "adapter_model.safetensors", content)
    adapter.write(torch.full_like(adapter.weights, torch.nan))
    if not torch.equal(adapter.reload(folder, layout), vector):
        raise ExportError(f"{folder}: reads back with other numbers than were written")
    return digest

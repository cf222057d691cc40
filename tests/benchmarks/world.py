"""What is measured: SmolLM2-135M with adapters in its last ten layers, as in the quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pfl_lm.recipe import LoadedRecipe, load_recipe
from tests.tiny import client_rows, tiny_recipe, write_jsonl

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def recipe(
    folder: Path, *, tiny: bool = False, n_clients: int = 6, n_rows: int = 4, **changes: Any
) -> LoadedRecipe:
    """Return a recipe on clients with a few short rows, so that steps take little of the time.

    One thread, one optimizer step of one row in a turn; ``changes`` by dotted keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = client_rows((f"client-{i:02d}" for i in range(n_clients)), n_rows=n_rows)
    changes = {
        "data.path": str(write_jsonl(folder / "rows.jsonl", rows)),
        "runtime.output_dir": str(folder / "runs"),
        "runtime.threads": 1,
        "training.max_steps": 1,
        "training.per_device_train_batch_size": 1,
        "federation.rounds": 3,
        "method.precondition_target": "update",
        "method.update_scale": "match",
        "training.optimizer": "adamw",
        "training.learning_rate": 0.004,
        **changes,
    }
    if tiny:
        return load_recipe(tiny_recipe(folder, **changes))
    return load_recipe(QUICKSTART, [f"{key}={value}" for key, value in changes.items()])

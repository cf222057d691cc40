"""The remaining switches: presets, weights in averages, where Δ is measured from, epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pfl_lm.finetune import finetune
from pfl_lm.recipe import PFLAlignOptions, load_recipe
from pfl_lm.recipe.methods import PRESETS
from tests.tiny import client_rows, tiny_recipe, write_jsonl


def run(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return finetune(load_recipe(tiny_recipe(folder, **changes))).folder


def vector(folder: Path, name: str = "global_weights", client: str | None = None) -> torch.Tensor:
    where = "server" if client is None else f"clients/{client}"
    (path,) = (folder / where).glob("state-*.safetensors")
    return load_file(path)[name]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_switches(tmp_path: Path, preset: str) -> None:
    rate = {"training.learning_rate": 1.0}
    named = run(tmp_path / "named", **{"method.preset": preset}, **rate)
    spelled = {f"method.{key}": value for key, value in PRESETS[preset].items()}
    written = run(tmp_path / "spelled", **spelled, **rate)
    assert torch.equal(vector(named), vector(written))


def test_every_preset_is_known_to_the_schema() -> None:
    for preset, switches in PRESETS.items():
        options = PFLAlignOptions.model_validate({"name": "pflalign", "preset": preset})
        assert {key: getattr(options, key) for key in switches} == switches


def test_sgd_is_fedavg_with_sgd(tmp_path: Path) -> None:
    rate = {"training.learning_rate": 0.5}
    sgd = run(tmp_path / "sgd", **{"method.preset": "sgd"}, **rate)
    fedavg = run(tmp_path / "fedavg", **{"method.name": "fedavg"}, **rate)
    assert torch.equal(vector(sgd), vector(fedavg))


@pytest.mark.parametrize("method", ["fedavg", "pflalign"])
@pytest.mark.parametrize("weighting", ["examples", "tokens", "uniform"])
def test_weights_in_averages(tmp_path: Path, method: str, weighting: str) -> None:
    rows = client_rows(("alice",), n_rows=12) + client_rows(("bob",))
    for row in rows[:12]:
        row["completion"] += " And on it goes, as it will."
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = run(
        tmp_path / "run",
        **{
            "method.name": method,
            "method.weighting": weighting,
            "federation.rounds": 1,
            "training.learning_rate": 0.5,
            "data.path": str(data),
        },
    )
    ends = [vector(folder, "weights", client).double().numpy() for client in ("alice", "bob")]
    by_weight = {"examples": (8, 5), "uniform": (1, 1)}
    if weighting == "tokens":
        import sqlite3

        with sqlite3.connect(folder / "federation.sqlite") as ledger:
            found = ledger.execute("SELECT weight FROM turns ORDER BY client").fetchall()
        by_weight["tokens"] = tuple(int(weight) for (weight,) in found)
        assert by_weight["tokens"][0] > 1.9 * by_weight["tokens"][1]
    expected = np.average(ends, axis=0, weights=by_weight[weighting])
    np.testing.assert_allclose(vector(folder).numpy(), expected, rtol=1e-6, atol=1e-9)


def test_post_goes_on_where_the_client_ended(tmp_path: Path) -> None:
    """With γ ≡ 0 nothing pulls a client back: alone in its own steps, it is `local`."""
    alone = {"training.learning_rate": 0.5, "method.preconditioner": False}
    post = run(
        tmp_path / "post",
        **{"method.offset_reference": "post", "method.correction": "none"},
        **alone,
    )
    local = run(tmp_path / "local", **{"method.name": "local", "training.learning_rate": 0.5})
    for client in ("alice", "bob", "carol"):
        assert torch.equal(vector(post, "weights", client), vector(local, "weights", client))


def test_post_measures_the_offset_from_the_newest_global_weights(tmp_path: Path) -> None:
    """With γ ≡ 1 and no gradient to speak of, a client ends at the w_g it has just received."""
    full = {"method.offset_reference": "post", "method.correction": "full"}
    strong, weak = {"training.learning_rate": 1.0}, {"training.learning_rate": 1e-12}
    one = run(tmp_path / "one", **{"federation.rounds": 1}, **full, **strong)
    assert float((vector(one, "weights", "bob") - vector(one)).norm()) > 1e-6
    two = run(tmp_path / "two", **{"federation.rounds": 2}, **full, **weak)
    torch.testing.assert_close(vector(two, "weights", "bob"), vector(two), rtol=0, atol=1e-6)


def test_local_epochs_are_whole_passes_in_whole_steps(tmp_path: Path) -> None:
    import sqlite3

    rows = client_rows(("alice",), n_rows=12) + client_rows(("bob",))
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = run(
        tmp_path / "run",
        **{"training.max_steps": None, "training.local_epochs": 2, "data.path": str(data)},
    )
    with sqlite3.connect(folder / "federation.sqlite") as ledger:
        steps = dict(ledger.execute("SELECT client, steps FROM turns WHERE round = 1"))
    assert steps == {"alice": 8, "bob": 6}  # 8 and 5 train rows in batches of 2, twice

"""One finished run for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import client_rows, tiny_recipe, write_jsonl

HOSTILE = "](http://x.example) <script>alert(1)</script> |`*_\u202e"
HOSTILE_SLUG = "http-x-example-script-alert-1-script"
BASE_ID = "tiny-org/tiny-llama"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three clients, one with a hostile id. Read it, do not write to it."""
    from pfl_lm.finetune import finetune
    from pfl_lm.recipe import load_recipe

    folder = tmp_path_factory.mktemp("export")
    data = write_jsonl(folder / "rows.jsonl", client_rows(["alice", "bob", HOSTILE]))
    recipe = tiny_recipe(folder, **{"backbone.base_model_id": BASE_ID, "data.path": str(data)})
    return finetune(load_recipe(recipe)).folder

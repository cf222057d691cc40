"""One finished run for all tests of this folder, and a Hub to push it to."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.export.fake_hub import TOKEN, FakeHub
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


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may do anything to."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub of our own, which huggingface_hub takes for the real one, and a token for it."""
    import huggingface_hub
    from huggingface_hub import constants

    fake = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-logins"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", fake.naps.append)
    huggingface_hub.close_session()
    yield fake
    huggingface_hub.close_session()
    fake.shutdown()
    fake.server_close()
    assert [line for line in fake.unhandled if "agent-harnesses" not in line] == []

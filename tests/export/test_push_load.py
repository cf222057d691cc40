"""What was pushed loads from the Hub as it loads from the run folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.conftest import BASE_ID, HOSTILE_SLUG
from tests.export.fake_hub import FakeHub
from tests.export.pushing import REPO, of_clients, push

ROOT = Path(__file__).parents[2]


def test_the_cards_on_the_hub_load_from_the_hub(run_folder: Path, hub: FakeHub) -> None:
    push(run_folder)

    files = hub.repos[REPO].files
    for path, slug in [
        ("clients/alice/README.md", "alice"),
        (f"clients/{HOSTILE_SLUG}/README.md", HOSTILE_SLUG),
        ("README.md", HOSTILE_SLUG),
    ]:
        card = files[path].decode()
        assert f'adapter = "{REPO}"' in card
        assert f'from_pretrained(model, adapter, subfolder="clients/{slug}")' in card
        assert "run folder" not in card


LOAD = """
import re, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

local, base, repo, card = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
tokens = torch.arange(24).view(2, 12)
plain = model.eval()(tokens).logits
here = PeftModel.from_pretrained(model, local).eval()(tokens).logits
model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
both = PeftModel.from_pretrained(model, repo, subfolder="clients/alice").eval()
there = both(tokens).logits
assert torch.equal(here, there) and not torch.equal(plain, there)
both.load_adapter(repo, adapter_name="b", subfolder="clients/bob")
both.set_adapter("b")
assert not torch.equal(both(tokens).logits, there)
code = re.search("```python\\n(.*?)```", open(card).read(), re.DOTALL)[1]
exec(code.replace("max_new_tokens=64", "max_new_tokens=3"))
print("loaded", model.peft_config["default"].base_model_name_or_path)
"""


def test_peft_loads_the_same_adapter_from_the_hub_and_the_cards_code_runs(
    run_folder: Path, tiny_model_dir: Path, tmp_path: Path, hub: FakeHub
) -> None:
    hub.add_repo(BASE_ID, {f.name: f.read_bytes() for f in tiny_model_dir.iterdir()}, private=False)
    push(run_folder)
    card = tmp_path / "card.md"
    card.write_bytes(hub.repos[REPO].files["clients/alice/README.md"])

    done = subprocess.run(
        [sys.executable, "-c", LOAD, run_folder / "adapters/alice", BASE_ID, REPO, card],
        env=os.environ
        | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"loaded {BASE_ID}"


def test_a_push_imports_no_torch(run_folder: Path, hub: FakeHub, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pfl_lm.cli.app import app\n"
        f"sys.argv = ['pfl-lm', 'push', {str(run_folder)!r}, '--repo', {REPO!r}]\n"
        "try:\n    app()\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "print('torch' in sys.modules, 'peft' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )

    assert done.stdout.splitlines()[-1] == "False False", done.stderr
    assert set(hub.repos[REPO].files) == of_clients("alice", "bob", HOSTILE_SLUG)
    assert done.stderr == ""


@pytest.mark.parametrize("word", ["torch", "peft", "federation"])
def test_what_a_push_needs_is_light(word: str) -> None:
    code = (
        "import sys, pfl_lm.export.hub, pfl_lm.export.plan, pfl_lm.export.card; print(*sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not [name for name in done.stdout.split() if word in name.split(".")]

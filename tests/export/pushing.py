"""What the tests of a push share: the command itself, and what a Hub should then hold."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from pfl_lm.cli.app import app
from tests.export.fake_hub import OWNER, FakeHub

REPO = f"{OWNER}/adapters"
_OF_CLIENT = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def push(run: Path, *more: str, repo: str = REPO) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["push", str(run), "--repo", repo, *more])
    return done.exit_code, done.stdout, done.stderr


def of_clients(*slugs: str) -> set[str]:
    front = {".gitattributes", "README.md", "adapters.json"}
    return front | {f"clients/{slug}/{name}" for slug in slugs for name in _OF_CLIENT}


def committed(hub: FakeHub) -> list[str]:
    """Return the paths in the commits of the log."""
    commits = [request for request in hub.sent() if "/commit/" in request.path]
    lines = [json.loads(line) for request in commits for line in request.body.splitlines()]
    return [line["value"]["path"] for line in lines if line["key"] != "header"]


def committed_content(hub: FakeHub) -> list[str]:
    commits = [request for request in hub.sent() if "/commit/" in request.path]
    lines = [json.loads(line) for request in commits for line in request.body.splitlines()]
    return [line["value"]["content"] for line in lines if line["key"] == "file"]

"""A run that has noted diagnostics."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.diagnosed import FAR, ON
from tests.interruptions import whole


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has noted diagnostics. Copy it, or read it only."""
    return whole(tmp_path_factory.mktemp("kept"), **ON, **FAR)


@pytest.fixture
def run(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "run"))

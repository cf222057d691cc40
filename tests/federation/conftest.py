"""A ledger of a run that has begun, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pfl_lm.federation.ledger import Ledger
from tests.federation.entries import CLIENTS


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "federation.sqlite")
    opened.open_run({"name": "tiny", "method": "pflalign"}, CLIENTS)
    yield opened
    opened.close()

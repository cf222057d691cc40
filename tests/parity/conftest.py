"""What every comparison with a loop written by hand starts from."""

from __future__ import annotations

import pytest
from torch import Tensor

from tests.parity.runs import global_weights, run


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """The adapter every client starts from: what `local` leaves on the server."""
    return global_weights(run(tmp_path_factory.mktemp("start"), **{"method.name": "local"}))

"""A thousand clients, one after another: each takes its turn and leaves nothing in memory."""

from __future__ import annotations

import pytest

from tests.benchmarks.many import CLIENTS, FEW, run_apart


@pytest.mark.slow
def test_a_thousand_clients_take_no_more_memory_than_a_hundred() -> None:
    seen = run_apart(CLIENTS)
    resident = seen["resident"]
    assert len(resident) == CLIENTS + 1
    assert resident[CLIENTS - 1] - resident[FEW - 1] < 100  # MB
    assert resident[-1] - resident[FEW - 1] < 100  # and when all are scored and exported

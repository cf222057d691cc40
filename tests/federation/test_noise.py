"""The secret of a run: drawn once, kept in the ledger, told to nobody."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pfl_lm.errors import RunFolderError
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.messages import Assignment
from pfl_lm.federation.noise import client_noise, noise_seed
from pfl_lm.methods import Broadcast


def test_it_is_drawn_once_and_read_again_from_the_ledger(tmp_path: Path) -> None:
    first, second = (Ledger(tmp_path / f"{name}.sqlite") for name in "ab")
    known = noise_seed(first)
    assert noise_seed(first) == known != noise_seed(second)
    assert known.bit_length() > 90
    first.close()
    second.close()
    with closing(sqlite3.connect(tmp_path / "a.sqlite")) as rows:
        assert rows.execute("SELECT * FROM run").fetchall() == [("noise_seed", str(known))]


@pytest.mark.parametrize("written", ["", "x", "-3", "²"])
def test_another_value_in_its_place_is_refused_and_not_shown(tmp_path: Path, written: str) -> None:
    ledger = Ledger(tmp_path / "federation.sqlite")
    ledger.note("noise_seed", written)
    with pytest.raises(RunFolderError) as caught:
        noise_seed(ledger)
    ledger.close()
    assert caught.value.message == (
        f"{tmp_path / 'federation.sqlite'}: the noise_seed of this run is not a number"
    )


def test_every_client_and_round_has_noise_of_its_own() -> None:
    seeds = {
        client_noise(secret, client, round)
        for secret in (1, 2)
        for client in ("alice", "bob", "server")
        for round in (1, 2)
    }
    assert len(seeds) == 12
    assert client_noise(1, "alice", 1) == client_noise(1, "alice", 1)


def test_a_task_does_not_print_it() -> None:
    task = Assignment("run", 1, "alice", "train", Broadcast({}), None, 1, 2, noise_seed=987654)
    assert "987654" not in repr(task)

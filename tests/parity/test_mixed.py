"""Whole runs of flexlora and hetlora, clients of three ranks, against references in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity import reference_methods as reference
from tests.parity.plain import PlainClient
from tests.parity.reference_methods import Federation, Ranks
from tests.parity.runs import CLIENTS, global_weights, run, state
from tests.tiny import client_rows, tiny_model

RATE = 2.0
LARGEST = 8
UNEVEN = [*client_rows(("alice",), n_rows=12), *client_rows(("bob", "carol"))]
OF = {"alice": 5, "bob": 2, "carol": 8}
RULES = [{"match": {"ids": [k]}, "r": r} for k, r in OF.items() if r != LARGEST]


def run_mixed(folder: Path, name: str, rules: list[dict[str, Any]], **changes: Any) -> Path:
    how = {"method.name": name, "clients": rules, "training.learning_rate": RATE}
    return run(folder, rows=UNEVEN, **how, **changes)


@pytest.fixture
def federation(tmp_path: Path, start: Tensor) -> Federation:
    return Federation(tmp_path, PlainClient(tiny_model(), start), start, RATE)


@pytest.fixture
def ranks(federation: Federation) -> Ranks:
    shapes = [tuple(p.shape) for p in federation.plain.parameters]
    return Ranks(shapes, LARGEST, OF)  # type: ignore[arg-type]


def own(ranks: Ranks, w: Tensor, client: str) -> Tensor:
    """The numbers that a client of this rank has, in their order."""
    return w[ranks.cut(torch.ones_like(w), ranks.of[client]).bool()]


def test_hetlora_is_its_paper(
    tmp_path: Path, start: Tensor, federation: Federation, ranks: Ranks
) -> None:
    folder = run_mixed(tmp_path, "hetlora", RULES)
    shared, ends = reference.hetlora(federation, ranks)
    found = global_weights(folder).double()
    torch.testing.assert_close(found - start, shared - start, rtol=1e-3, atol=1e-6)
    uniform = run_mixed(tmp_path / "uniform", "hetlora", RULES, **{"method.weighting": "uniform"})
    gap = float((global_weights(uniform) - found).norm())
    assert gap > 100 * float((found - shared).norm())
    for client in CLIENTS:
        kept = state(folder, client)["weights"].double()
        wanted = own(ranks, ends[client], client)
        assert kept.shape == wanted.shape
        torch.testing.assert_close(kept, wanted, rtol=1e-3, atol=1e-6)


def test_flexlora_is_its_paper(
    tmp_path: Path, start: Tensor, federation: Federation, ranks: Ranks
) -> None:
    """B A of the server is the best of rank 8 of the mean: factors turn where σ are alike."""
    folder = run_mixed(tmp_path, "flexlora", RULES)
    products, ends = reference.flexlora(federation, ranks)
    matrices = ranks.matrices(global_weights(folder).double())
    for a, b, mean in zip(matrices[::2], matrices[1::2], products, strict=True):
        u, s, vt = torch.linalg.svd(mean)
        best = (u[:, :LARGEST] * s[:LARGEST]) @ vt[:LARGEST]
        assert float((b @ a - best).norm()) < 1e-4 * float(best.norm())
        assert float(s[OF["bob"] :].norm()) > 1e-3 * float(s[0])  # bob is sent less than there is
    for client in CLIENTS:
        kept = torch.zeros(len(start)).double()
        kept[ranks.cut(torch.ones_like(kept), OF[client]).bool()] = state(folder, client)[
            "weights"
        ].double()
        pairs = [ranks.matrices(w) for w in (kept, ends[client])]
        for i in range(0, len(ranks.shapes), 2):
            found, wanted = (m[i + 1] @ m[i] for m in pairs)
            assert float((found - wanted).norm()) < 1e-3 * float(wanted.norm())


@pytest.mark.parametrize("weighting", ["examples", "tokens", "uniform"])
def test_hetlora_of_one_rank_is_fedavg_bit_for_bit(tmp_path: Path, weighting: str) -> None:
    runs = [
        run_mixed(tmp_path / name, name, [], **{"method.weighting": weighting})
        for name in ("fedavg", "hetlora")
    ]
    assert torch.equal(*map(global_weights, runs))
    for client in CLIENTS:
        assert torch.equal(*(state(folder, client)["weights"] for folder in runs))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("r", [8, 3])
def test_flexlora_with_one_client_turns_its_adapter_without_changing_what_it_does(
    tmp_path: Path, optimizer: str, r: int
) -> None:
    """Of rank 3 too, in a server of rank 8: the product of one client's factors has no more."""
    how = {"training.optimizer": optimizer, "training.learning_rate": 0.05}
    rules = [{"match": {"ids": ["alice"]}, "r": r}]
    folder = run(tmp_path, ("alice",), **{"method.name": "flexlora", "clients": rules}, **how)
    plain = PlainClient(tiny_model(), global_weights(folder))
    shapes = [tuple(p.shape) for p in plain.parameters]
    ranks = Ranks(shapes, LARGEST, {"alice": r})  # type: ignore[arg-type]
    local = torch.zeros(len(plain.w))
    local[ranks.cut(torch.ones_like(local), r).bool()] = state(folder, "alice")["weights"]
    assert not torch.equal(local, global_weights(folder))
    one, other = (ranks.matrices(w.double()) for w in (global_weights(folder), local))
    for i in range(0, len(shapes), 2):
        found, wanted = one[i + 1] @ one[i], other[i + 1] @ other[i]
        assert float((found - wanted).norm()) < 1e-6 * float(wanted.norm())
        assert float(wanted.norm()) > 0

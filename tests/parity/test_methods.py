"""Whole runs of the other methods against references, and what they are with neutral options."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parity import reference_methods as reference
from tests.parity.plain import PlainClient
from tests.parity.reference_methods import Federation
from tests.parity.runs import CLIENTS, ROUNDS, batches, global_weights, run, state
from tests.tiny import client_rows, tiny_model

RATE = 0.5
UNEVEN = [*client_rows(("alice",), n_rows=12), *client_rows(("bob", "carol"))]


def run_uneven(folder: Path, name: str, **options: Any) -> Path:
    """Run three rounds with SGD; alice has more rows than the others."""
    method = {"method.name": name} | {f"method.{key}": value for key, value in options.items()}
    return run(folder, rows=UNEVEN, **{"training.learning_rate": RATE}, **method)


@pytest.fixture
def federation(tmp_path: Path, start: Tensor) -> Federation:
    return Federation(tmp_path, PlainClient(tiny_model(), start), start, RATE)


def check(
    found: Tensor, wanted: Tensor, start: Tensor, without: Tensor, atol: float = 1e-7
) -> None:
    """Compare changes of the start; ``without`` is what another rule would have led to."""
    error = float((found.double() - wanted).norm())
    change, expected = found.double() - start.double(), wanted - start.double()
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=atol)
    assert float((wanted - without).norm()) > 100 * error


# --- fedprox ----------------------------------------------------------------------------------


def test_fedprox_is_its_paper(tmp_path: Path, start: Tensor, federation: Federation) -> None:
    folder = run_uneven(tmp_path, "fedprox", mu=0.5)
    shared, ends = reference.fedprox(federation, mu=0.5)
    without, plain_ends = reference.fedprox(federation, mu=0.0)
    check(global_weights(folder), shared, start, without)
    for client in CLIENTS:
        check(state(folder, client)["weights"], ends[client], start, plain_ends[client])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fedprox_with_one_client_is_a_plain_loop(
    tmp_path: Path, start: Tensor, optimizer: str
) -> None:
    """With AdamW the pull goes through the moments, as part of the gradient."""
    changes = {"method.name": "fedprox", "method.mu": 0.5, "training.learning_rate": 0.02}
    folder = run(tmp_path, ("alice",), **changes, **{"training.optimizer": optimizer})
    plain = PlainClient(tiny_model(), start)
    for round in range(1, ROUNDS + 1):
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        base = kind(plain.parameters, lr=0.02, weight_decay=0.0)
        shared = [parameter.detach().clone() for parameter in plain.parameters]
        for batch in batches(tmp_path, "alice", round):
            plain.gradient(batch)
            for parameter, at in zip(plain.parameters, shared, strict=True):
                parameter.grad.add_(parameter.detach() - at, alpha=0.5)
            base.step()
    assert torch.equal(global_weights(folder), plain.w)


def test_fedprox_without_a_pull_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    one = run_uneven(tmp_path / "a", "fedprox", mu=0.0)
    other = run_uneven(tmp_path / "b", "fedavg")
    assert torch.equal(global_weights(one), global_weights(other))
    for client in CLIENTS:
        assert torch.equal(state(one, client)["weights"], state(other, client)["weights"])


# --- fedavgm, fedadam ---------------------------------------------------------------------------


def test_fedavgm_is_its_paper(tmp_path: Path, start: Tensor, federation: Federation) -> None:
    folder = run_uneven(tmp_path, "fedavgm", server_momentum=0.6, server_learning_rate=0.8)
    shared, ends = reference.fedavgm(federation, 0.6, 0.8)
    without, plain_ends = reference.fedavgm(federation, 0.0, 0.8)
    check(global_weights(folder), shared, start, without)
    for client in CLIENTS:
        check(state(folder, client)["weights"], ends[client], start, plain_ends[client])


def test_fedavgm_at_rest_is_fedavg(tmp_path: Path) -> None:
    """The server's sums round once, so here they even agree to the bit."""
    one = run_uneven(tmp_path / "a", "fedavgm", server_momentum=0.0)
    other = run_uneven(tmp_path / "b", "fedavg")
    assert torch.equal(global_weights(one), global_weights(other))
    for client in CLIENTS:
        assert torch.equal(state(one, client)["weights"], state(other, client)["weights"])


def test_fedadam_is_its_paper(tmp_path: Path, start: Tensor, federation: Federation) -> None:
    """Where D is far below τ, a step is η_s/τ = 200 times it, and so is its rounding."""
    own = {"server_learning_rate": 0.02, "beta_1": 0.7, "beta_2": 0.8, "tau": 1e-4}
    folder = run_uneven(tmp_path, "fedadam", **own)
    shared, ends = reference.fedadam(federation, 0.02, 0.7, 0.8, 1e-4)
    without, plain_ends = reference.fedadam(federation, 0.02, 0.7, 0.7, 1e-4)
    check(global_weights(folder), shared, start, without, atol=2e-6)
    for client in CLIENTS:
        local = state(folder, client)["weights"]
        check(local, ends[client], start, plain_ends[client], atol=2e-6)


# --- scaffold -----------------------------------------------------------------------------------


def cohorts(folder: Path) -> list[list[str]]:
    """Return who took part, round by round."""
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        rows = ledger.execute("SELECT round, client FROM turns ORDER BY round, client").fetchall()
    return [[client for n, client in rows if n == round] for round in range(1, ROUNDS + 1)]


@pytest.mark.parametrize("share", [1.0, 0.67], ids=["all", "two of three"])
def test_scaffold_is_its_paper(
    tmp_path: Path, start: Tensor, federation: Federation, share: float
) -> None:
    """Although neither Δy nor Δc is sent, and alice has more rows than the others."""
    method = {"method.name": "scaffold", "method.server_learning_rate": 0.8}
    some = {"training.learning_rate": RATE, "federation.fraction_train": share}
    folder = run(tmp_path, rows=UNEVEN, **method, **some)
    who = cohorts(folder)
    assert {len(cohort) for cohort in who} == {3 if share == 1 else 2}

    x, y, c, c_of = reference.scaffold(federation, 0.8, who)
    without, plain, *_ = reference.scaffold(federation, 0.8, who, corrected=False)

    check(global_weights(folder), x, start, without)
    server = load_file(folder / "server" / f"state-{ROUNDS}.safetensors")
    torch.testing.assert_close(server["control"].double(), c, rtol=1e-4, atol=1e-6)
    last = {client: n for n, cohort in enumerate(who, 1) for client in cohort}
    for client, n in last.items():
        kept = state(folder, client, n)
        torch.testing.assert_close(kept["control"].double(), c_of[client], rtol=1e-4, atol=1e-6)
        if n > 1:  # in the first round there is nothing to correct
            check(kept["weights"], y[client], start, plain[client])


def test_the_first_round_of_scaffold_is_fedavgs(tmp_path: Path) -> None:
    """c and every c_i are zero then; clients count alike."""
    one_round = {"federation.rounds": 1, "training.learning_rate": RATE}
    scaffold = run(tmp_path / "a", rows=UNEVEN, **one_round, **{"method.name": "scaffold"})
    alike = {"method.name": "fedavg", "method.weighting": "uniform"}
    fedavg = run(tmp_path / "b", rows=UNEVEN, **one_round, **alike)
    one, other = (
        load_file(folder / "server" / "state-1.safetensors")["global_weights"]
        for folder in (scaffold, fedavg)
    )
    assert torch.equal(one, other)


def test_scaffold_with_one_client_is_a_plain_loop(tmp_path: Path, start: Tensor) -> None:
    """c is c_i then, so nothing is corrected."""
    changes = {"method.name": "scaffold", "training.learning_rate": 0.02}
    folder = run(tmp_path, ("alice",), **changes)
    plain = PlainClient(tiny_model(), start)
    base = torch.optim.SGD(plain.parameters, lr=0.02)
    for round in range(1, ROUNDS + 1):
        plain.fit(batches(tmp_path, "alice", round), base)
    torch.testing.assert_close(global_weights(folder), plain.w, rtol=1e-6, atol=1e-8)


# --- ditto --------------------------------------------------------------------------------------


def test_ditto_is_its_paper(tmp_path: Path, start: Tensor, federation: Federation) -> None:
    """From round 2 on both paths differ, and v is pulled to the w_g that its round began with."""
    folder = run_uneven(tmp_path, "ditto", lam=0.3)
    shared, ends, v = reference.ditto(federation, lam=0.3)
    _, _, without = reference.ditto(federation, lam=0.0)
    check(global_weights(folder), shared, start, start.double())
    for client in CLIENTS:
        kept = state(folder, client)
        check(kept["weights"], ends[client], start, v[client])
        check(kept["personal"], v[client], start, without[client])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_ditto_is_fedavg_on_one_path_and_without_a_pull_local_on_the_other(
    tmp_path: Path, optimizer: str
) -> None:
    """Bit for bit, with AdamW's moments of the personal path."""
    how = {"training.optimizer": optimizer, "training.learning_rate": 0.02}

    def of(name: str, **method: Any) -> Path:
        return run(tmp_path / name, rows=UNEVEN, **{"method.name": name}, **method, **how)

    ditto, fedavg, local = of("ditto", **{"method.lam": 0.0}), of("fedavg"), of("local")
    assert torch.equal(global_weights(ditto), global_weights(fedavg))
    for client in CLIENTS:
        kept, alone = state(ditto, client), state(local, client)
        assert torch.equal(kept.pop("weights"), state(fedavg, client)["weights"])
        assert torch.equal(kept.pop("personal"), alone.pop("weights"))
        assert kept.keys() == alone.keys()
        assert len(kept) == (2 if optimizer == "adamw" else 0)
        assert all(torch.equal(kept[name], alone[name]) for name in kept)


def test_a_pull_does_not_touch_dittos_shared_path(tmp_path: Path) -> None:
    weak, strong = (run_uneven(tmp_path / str(lam), "ditto", lam=lam) for lam in (0.0, 1.5))
    assert torch.equal(global_weights(weak), global_weights(strong))
    for client in CLIENTS:
        one, other = state(weak, client), state(strong, client)
        assert torch.equal(one["weights"], other["weights"])
        away = [(kept["personal"] - global_weights(weak)).norm() for kept in (one, other)]
        assert away[1] < away[0]


# --- ffa_lora, fedsa_lora, rolora ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["ffa_lora", "rolora"])
def test_one_shared_adapter_by_factors_is_its_paper(
    tmp_path: Path, start: Tensor, federation: Federation, name: str
) -> None:
    folder = run_uneven(tmp_path, name)
    shared, ends = getattr(reference, name)(federation)
    without, plain_ends = reference.fedprox(federation, mu=0.0)
    check(global_weights(folder), shared, start, without)
    for client in CLIENTS:
        check(state(folder, client)["weights"], ends[client], start, plain_ends[client])


def test_fedsa_lora_is_its_paper(tmp_path: Path, start: Tensor, federation: Federation) -> None:
    folder = run_uneven(tmp_path, "fedsa_lora")
    shared_a, own = reference.fedsa_lora(federation)
    without, plain_ends = reference.fedprox(federation, mu=0.0)
    a = federation.only("A").bool()
    server = load_file(folder / "server" / f"state-{ROUNDS}.safetensors")
    assert server.keys() == {"global_A"}
    check(server["global_A"], shared_a[a], start[a], without[a])
    for client in CLIENTS:
        check(state(folder, client)["weights"], own[client], start, plain_ends[client])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["ffa_lora", "rolora"])
def test_a_factor_of_one_client_is_a_plain_loop_over_it(
    tmp_path: Path, start: Tensor, name: str, optimizer: str
) -> None:
    """Bit for bit; the optimizer begins anew in every round."""
    changes = {"training.optimizer": optimizer, "training.learning_rate": 0.02}
    folder = run(tmp_path, ("alice",), **{"method.name": name}, **changes)
    plain = PlainClient(tiny_model(), start)
    named = [p for p in plain.model.named_parameters() if p[1].requires_grad]
    for round in range(1, ROUNDS + 1):
        factor = "A" if name == "rolora" and round == 2 else "B"
        trained = [parameter for key, parameter in named if f"lora_{factor}" in key]
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        base = kind(trained, lr=0.02, weight_decay=0.0)
        plain.fit(batches(tmp_path, "alice", round), base)
    assert torch.equal(global_weights(folder), plain.w)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fedsa_lora_with_one_client_is_fedavg_with_one(tmp_path: Path, optimizer: str) -> None:
    changes = {"training.optimizer": optimizer, "training.learning_rate": 0.02}
    one = run(tmp_path / "a", ("alice",), **{"method.name": "fedsa_lora"}, **changes)
    other = run(tmp_path / "b", ("alice",), **{"method.name": "fedavg"}, **changes)
    assert torch.equal(state(one, "alice")["weights"], state(other, "alice")["weights"])

"""flexlora and hetlora: clients of several ranks and modules, and the server between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import pfl_lm.methods.flexlora
from pfl_lm.errors import AggregationError
from pfl_lm.layout import AdapterLayout, Factor, Vector
from pfl_lm.methods import METHODS, Method, ServerState, Setup, Upload
from pfl_lm.methods.mixed import effect
from pfl_lm.methods.svd import MeanProduct, in_chunks
from pfl_lm.recipe.methods import METHOD_OPTIONS
from tests.world import options

SIZES = {"q": (7, 9), "v": (5, 9)}
"""Each module's out and in."""


def layout_of(r: int, modules: tuple[str, ...] = ("q", "v")) -> AdapterLayout:
    matrices: list[tuple[str, Factor, tuple[int, ...]]] = []
    for module in modules:
        out, into = SIZES[module]
        matrices += [(f"0.{module}", "A", (r, into)), (f"0.{module}", "B", (out, r))]
    return AdapterLayout.of(matrices)


def method_of(
    name: str, r: int, clients: Mapping[str, AdapterLayout] | None = None, **own: Any
) -> Method:
    setup = Setup(layout_of(r), 3, 0, options(), layouts=clients or {})
    return METHODS[name](METHOD_OPTIONS[name].model_validate({"name": name, **own}), setup)


def random(layout: AdapterLayout, seed: int) -> Vector:
    return torch.randn(layout.d, generator=torch.Generator().manual_seed(seed))


def server_at(r: int, seed: int = 99) -> ServerState:
    return ServerState({"global_weights": random(layout_of(r), seed)})


def products(layout: AdapterLayout, vector: Vector) -> dict[str, Tensor]:
    """Return B A of each module, in float64."""
    named = layout.split(vector.double())
    return {a.module: named[b.name] @ named[a.name] for a, b in layout.pairs}


def sent_by(clients: Mapping[str, AdapterLayout], weights: Mapping[str, float]) -> list[Upload]:
    return [
        Upload({"weights": random(own, seed)}, weights[client], client=client)
        for seed, (client, own) in enumerate(sorted(clients.items()))
    ]


def after(method: Method, server: ServerState, uploads: list[Upload]) -> Vector:
    return method.aggregate(server, uploads, 1).vectors["global_weights"]


MIXED = {"a": layout_of(2), "b": layout_of(1), "c": layout_of(2, ("q",))}
WEIGHTS = {"a": 3.0, "b": 5.0, "c": 4.0}


# --- flexlora ---------------------------------------------------------------------------------


def test_what_adapters_do_is_averaged_and_nothing_of_it_is_lost() -> None:
    """The ranks together, 2 + 1 + 2, are the server's: B A of what follows is the mean of B A."""
    method, uploads = method_of("flexlora", 5, MIXED), sent_by(MIXED, WEIGHTS)
    found = products(layout_of(5), after(method, server_at(5), uploads))
    each = {u.client: products(MIXED[u.client], u.vectors["weights"]) for u in uploads}
    of_q = sum(WEIGHTS[c] * each[c]["0.q"] for c in "abc") / 12
    of_v = sum(WEIGHTS[c] * each[c]["0.v"] for c in "ab") / 8  # c does not adapt it
    torch.testing.assert_close(found["0.q"], of_q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["0.v"], of_v, rtol=1e-5, atol=1e-6)


def test_fedavg_would_have_lost_it() -> None:
    """Else the test above would hold of any average."""
    alike = {client: layout_of(5) for client in "abc"}
    uploads = sent_by(alike, WEIGHTS)
    each = [products(layout_of(5), u.vectors["weights"]) for u in uploads]
    mean = sum(u.weight * p["0.v"] for u, p in zip(uploads, each, strict=True)) / 12
    gaps = {}
    for name in ("fedavg", "flexlora"):
        end = products(layout_of(5), after(method_of(name, 5), server_at(5), uploads))["0.v"]
        gaps[name] = float((end - mean).norm() / torch.as_tensor(mean).norm())
    assert gaps["flexlora"] < 1e-6  # v has five rows, so rank 5 is all there is
    assert gaps["fedavg"] > 0.3


@pytest.mark.parametrize("r", [1, 2, 3])
def test_each_client_is_sent_the_best_of_its_rank(r: int) -> None:
    """Eckart and Young: no matrix of rank r is nearer than √(σ²_{r+1} + …)."""
    small = {**MIXED, "d": layout_of(r)}
    method = method_of("flexlora", 5, small)
    server = method.aggregate(server_at(5), sent_by(MIXED, WEIGHTS), 1)
    whole = products(layout_of(5), server.vectors["global_weights"])
    cut = products(layout_of(r), method.broadcast(server, "d").vectors["global_weights"])
    for module, product in whole.items():
        beyond = torch.linalg.svdvals(product)[r:].square().sum().sqrt()
        torch.testing.assert_close((product - cut[module]).norm(), beyond, rtol=1e-4, atol=1e-5)
        assert float(beyond) > 0.1 or (r, module) == (3, "0.v")  # whose mean has rank 3


def test_a_is_orthonormal_and_b_falls_and_signs_are_settled() -> None:
    end = after(method_of("flexlora", 3, MIXED), server_at(3), sent_by(MIXED, WEIGHTS))
    for name, matrix in layout_of(3).split(end).items():
        if name.endswith("A"):
            torch.testing.assert_close(matrix @ matrix.T, torch.eye(3), rtol=0, atol=1e-6)
            assert (matrix.gather(1, matrix.abs().argmax(1, keepdim=True)) > 0).all()
        else:
            sizes = matrix.norm(dim=0)
            assert (sizes[:-1] >= sizes[1:]).all()


def test_by_hand() -> None:
    """Two clients, equal weights: B A are diag(4, 0) and diag(0, -2), the mean diag(2, -1)."""
    pair: list[tuple[str, Factor, tuple[int, ...]]] = [("0.x", "A", (1, 2)), ("0.x", "B", (2, 1))]
    one = AdapterLayout.of(pair)
    two = AdapterLayout.of([("0.x", "A", (2, 2)), ("0.x", "B", (2, 2))])
    setup = Setup(two, 2, 0, options(), layouts={"a": one, "b": one})
    method = METHODS["flexlora"](METHOD_OPTIONS["flexlora"](name="flexlora"), setup)
    uploads = [
        Upload({"weights": torch.tensor([2.0, 0.0, 2.0, 0.0])}, 1.0, client="a"),
        Upload({"weights": torch.tensor([0.0, -1.0, 0.0, 2.0])}, 1.0, client="b"),
    ]
    server = method.aggregate(ServerState({"global_weights": torch.ones(8)}), uploads, 1)
    a, b = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([2.0, 0.0, 0.0, -1.0])
    torch.testing.assert_close(server.vectors["global_weights"], torch.cat([a, b]))
    sent = method.broadcast(server, "b").vectors["global_weights"]
    torch.testing.assert_close(sent, torch.tensor([1.0, 0.0, 2.0, 0.0]))


def test_what_the_mean_has_not_got_can_still_be_trained() -> None:
    """One client of rank 1 in a server of rank 3: B is zero beyond, and A keeps its rows."""
    method, server = method_of("flexlora", 3, {"b": layout_of(1)}), server_at(3)
    end = after(method, server, sent_by({"b": layout_of(1)}, WEIGHTS))
    before = layout_of(3).split(server.vectors["global_weights"])
    for name, matrix in layout_of(3).split(end).items():
        if name.endswith("A"):
            assert torch.equal(matrix[1:], before[name][1:])
            assert not torch.equal(matrix[0], before[name][0])
        else:
            assert not matrix[:, 1:].any()
            assert matrix[:, 0].any()


def test_where_nobody_has_trained_nothing_changes() -> None:
    layout, method = layout_of(3), method_of("flexlora", 3)
    untouched = layout.without_effect(random(layout, 1))
    server = ServerState({"global_weights": untouched})
    uploads = [Upload({"weights": untouched.clone()}, 1.0) for _ in range(2)]
    assert torch.equal(after(method, server, uploads), untouched)


def test_both_ways_to_decompose_agree() -> None:
    """By QR, and of the sum itself, which is taken where the ranks together are many."""
    shape, ranks = (40, 30), (3, 4, 5)
    rng = torch.Generator().manual_seed(3)
    factors = [
        (torch.randn(40, r, generator=rng), torch.randn(r, 30, generator=rng)) for r in ranks
    ]
    means = [MeanProduct(shape, width) for width in (sum(ranks), 30)]
    assert [mean.dense for mean in means] == [False, True]
    found = []
    for mean in means:
        for weight, (b, a) in enumerate(factors, 1):
            mean.add(b, a, float(weight))
        b, a = torch.ones(40, 6), torch.ones(6, 30)
        mean.write_best(b, a)
        found.append((b, a))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    whole = sum(w * b.double() @ a.double() for w, (b, a) in enumerate(factors, 1)) / 6
    u, s, vt = torch.linalg.svd(torch.as_tensor(whole))
    best = (u[:, :6] * s[:6]) @ vt[:6]
    torch.testing.assert_close((found[0][0] @ found[0][1]).double(), best, rtol=1e-4, atol=1e-5)


def test_a_few_modules_at_a_time_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    method, uploads = method_of("flexlora", 5, MIXED), sent_by(MIXED, WEIGHTS)
    whole = after(method, server_at(5), uploads)
    chunks = [
        len(some)
        for some in in_chunks(layout_of(5), [MIXED[u.client] for u in uploads], chunk_bytes=1)
    ]
    assert chunks == [1, 1]
    monkeypatch.setattr(
        pfl_lm.methods.flexlora, "in_chunks", lambda layout, owns: in_chunks(layout, owns, 1)
    )
    assert torch.equal(after(method, server_at(5), uploads), whole)


def test_uploads_are_never_all_in_memory() -> None:
    """Of a chunk, the modules in it are; of the rest nothing, whatever the number of clients."""
    layout = AdapterLayout.of(
        [
            (f"{n}.q", factor, (4, 64) if factor == "A" else (64, 4))
            for n in range(10)
            for factor in ("A", "B")
        ]
    )
    for n in (2, 1000):
        held = [
            sum(MeanProduct.size(mean.shape, 4 * n) for _, _, mean in some)
            for some in in_chunks(layout, [layout] * n, chunk_bytes=100_000)
        ]
        assert max(held) <= 100_000
        assert len(held) == {2: 1, 1000: 4}[n]


# --- hetlora ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["examples", "tokens", "uniform"])
def test_of_one_rank_it_is_fedavg_bit_for_bit(weighting: str) -> None:
    alike = {client: layout_of(3) for client in "abc"}
    uploads = sent_by(alike, WEIGHTS)
    ends = [
        after(method_of(name, 3, weighting=weighting), server_at(3), uploads)
        for name in ("fedavg", "hetlora")
    ]
    assert torch.equal(*ends)


def test_an_average_of_several_ranks_by_hand() -> None:
    """‖B A‖ are 6, 2 and 0: the third says nothing, and b's zeros weigh a quarter."""
    matrices: list[tuple[str, Factor, tuple[int, ...]]] = [
        ("0.x", "A", (2, 1)),
        ("0.x", "B", (1, 2)),
    ]
    two = AdapterLayout.of(matrices)
    one = two.narrowed(1, ["x"])
    setup = Setup(two, 3, 0, options(), layouts={"b": one, "c": one})
    method = METHODS["hetlora"](METHOD_OPTIONS["hetlora"](name="hetlora"), setup)
    uploads = [
        Upload({"weights": torch.tensor([2.0, 4.0, 1.0, 1.0])}, 1.0, client="a"),  # B A = 6
        Upload({"weights": torch.tensor([2.0, 1.0])}, 1.0, client="b"),
        Upload({"weights": torch.tensor([9.0, 0.0])}, 1.0, client="c"),
    ]
    server = method.aggregate(ServerState({"global_weights": torch.zeros(4)}), uploads, 1)
    wanted = torch.tensor([2.0, 0.75 * 4, 1.0, 0.75 * 1])
    torch.testing.assert_close(server.vectors["global_weights"], wanted)
    sent = method.broadcast(server, "b").vectors["global_weights"]
    torch.testing.assert_close(sent, torch.tensor([2.0, 1.0]))


def test_the_effect_is_the_length_of_b_a() -> None:
    layout = layout_of(3)
    vector = random(layout, 4)
    squares = [float(p.square().sum()) for p in products(layout, vector).values()]
    assert effect(layout, vector) == pytest.approx(math.sqrt(sum(squares)), rel=1e-12)
    assert effect(layout, layout.without_effect(vector)) == 0.0


def test_a_module_is_averaged_over_those_who_adapt_it() -> None:
    """c has no v: were it counted there, v would shrink by its weight."""
    method = method_of("hetlora", 2, MIXED, weighting="examples")
    uploads = sent_by(MIXED, WEIGHTS)
    end = layout_of(2).split(after(method, server_at(2), uploads))
    whole = {u.client: layout_of(2).filled(u.vectors["weights"], MIXED[u.client]) for u in uploads}
    each = {client: layout_of(2).split(vector) for client, vector in whole.items()}
    for name, matrix in end.items():
        who = "ab" if ".v." in name else "abc"
        total = sum(WEIGHTS[c] for c in who)
        wanted = sum(WEIGHTS[c] * each[c][name].double() for c in who) / total
        torch.testing.assert_close(matrix.double(), wanted, rtol=1e-6, atol=1e-7)


def test_if_no_adapter_does_anything_all_weigh_alike() -> None:
    layout = layout_of(2)
    uploads = [Upload({"weights": layout.without_effect(random(layout, s))}, 1.0) for s in (1, 2)]
    end = after(method_of("hetlora", 2), server_at(2), uploads)
    mean = torch.stack([u.vectors["weights"].double() for u in uploads]).mean(0).float()
    assert torch.equal(end, mean)


# --- both -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flexlora", "hetlora"])
def test_a_round_of_small_clients_leaves_the_others_something_to_train(name: str) -> None:
    """Filled up with zeros and averaged, rows and columns beyond would be zero for good."""
    small = {"b": layout_of(1, ("q",))}
    method, server = method_of(name, 3, small), server_at(3)
    end = layout_of(3).split(after(method, server, sent_by(small, WEIGHTS)))
    before = layout_of(3).split(server.vectors["global_weights"])
    assert not torch.equal(end["0.q.A"][0], before["0.q.A"][0])
    assert torch.equal(end["0.q.A"][1:], before["0.q.A"][1:])
    for factor in "AB":
        assert torch.equal(end[f"0.v.{factor}"], before[f"0.v.{factor}"])
    if name == "hetlora":
        assert torch.equal(end["0.q.B"][:, 1:], before["0.q.B"][:, 1:])


@pytest.mark.parametrize("name", ["flexlora", "hetlora"])
def test_what_is_sent_and_kept_is_the_clients_own_slice(name: str) -> None:
    method, server = method_of(name, 3, MIXED), server_at(3)
    for client, own in MIXED.items():
        sent = method.broadcast(server, client).vectors["global_weights"]
        assert sent.shape == (own.d,)
        whole = layout_of(3).split(server.vectors["global_weights"])
        for entry, view in own.views(sent):
            rows, columns = entry.shape
            assert torch.equal(view, whole[entry.name][:rows, :columns])
    nobody = method.broadcast(server, "").vectors["global_weights"]
    assert torch.equal(nobody, server.vectors["global_weights"])


@pytest.mark.parametrize("name", ["flexlora", "hetlora"])
def test_aggregate_leaves_everything_alone_and_the_order_does_not_matter(name: str) -> None:
    method, server, uploads = method_of(name, 4, MIXED), server_at(4), sent_by(MIXED, WEIGHTS)
    before = server.vectors["global_weights"].clone()
    copies = [upload.vectors["weights"].clone() for upload in uploads]
    end = after(method, server, uploads)
    assert torch.equal(server.vectors["global_weights"], before)
    assert all(torch.equal(u.vectors["weights"], c) for u, c in zip(uploads, copies, strict=True))
    backwards = after(method, server, uploads[::-1])
    torch.testing.assert_close(backwards, end, rtol=1e-5, atol=1e-6)
    assert not torch.equal(end, before)


@pytest.mark.parametrize("name", ["flexlora", "hetlora"])
def test_bad_uploads_are_refused(name: str) -> None:
    method, server = method_of(name, 3, MIXED), server_at(3)
    good = sent_by(MIXED, WEIGHTS)

    def refused(*uploads: Upload) -> str:
        with pytest.raises(AggregationError) as caught:
            method.aggregate(server, list(uploads), 1)
        return caught.value.message

    assert "different shapes" in refused(*good, Upload({"weights": torch.ones(3)}, 1.0))
    nan = good[0].vectors["weights"].clone()
    nan[5] = torch.nan
    assert "must be finite" in refused(Upload({"weights": nan}, 1.0, client="a"), *good[1:])
    assert refused(Upload({}, 1.0)) == "an upload has no vector 'weights'"
    assert "cannot average 0 vectors" in refused()

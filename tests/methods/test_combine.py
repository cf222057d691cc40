"""Where uploads become the next global vector: by which rule, and how little it holds at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pfl_lm.errors import AggregationError
from pfl_lm.federation.watch import Watch
from pfl_lm.finetune import finetune
from pfl_lm.layout import AdapterLayout
from pfl_lm.methods import METHODS, Setup, Upload
from pfl_lm.methods.aggregate import Sent, mean_upload, weighted_mean
from pfl_lm.methods.combine import combine
from pfl_lm.methods.robust import clipped_mean, median, trimmed_mean
from pfl_lm.recipe import AggregationOptions, load_recipe
from pfl_lm.recipe.methods import METHOD_OPTIONS
from tests.parity import reference_rules
from tests.tiny import tiny_recipe
from tests.world import options

D = 120
START = torch.randn(D, generator=torch.Generator().manual_seed(1))
RULES: list[dict[str, Any]] = [
    {"rule": "mean"},
    {"rule": "clipped_mean", "clip_norm": 5.0},
    {"rule": "median"},
    {"rule": "trimmed_mean", "trim_fraction": 0.25},
]
every_rule = pytest.mark.parametrize("how", RULES, ids=[rule["rule"] for rule in RULES])


def uploads_of(n: int, name: str = "weights") -> list[Upload]:
    generator = torch.Generator().manual_seed(n)
    return [
        Upload(
            {name: START + k * torch.randn(D, generator=generator), "other": OTHER}, float(k + 1)
        )
        for k in range(n)
    ]


def setup_of(how: AggregationOptions) -> Setup:
    return Setup(AdapterLayout.of([]), 1, 0, options(), how)


OTHER = torch.full((D,), torch.nan)
"""A vector of an upload that nobody asks for."""


class Disk(Sequence[Upload]):
    """Uploads that are made when they are asked for, and noticed when they go."""

    def __init__(self, uploads: list[Upload]) -> None:
        self.kept = uploads
        self.reads = self.alive = self.most = 0

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, at: int) -> Upload: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Upload]: ...
    def __getitem__(self, at: int | slice) -> Upload | Sequence[Upload]:
        assert isinstance(at, int)
        kept = self.kept[at]
        vectors = {name: vector.clone() for name, vector in kept.vectors.items()}
        weakref.finalize(vectors["weights"], self._gone)
        self.reads += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        return Upload(vectors, kept.weight)

    def _gone(self) -> None:
        self.alive -= 1


def test_each_rule_is_the_one_it_is_called() -> None:
    uploads = uploads_of(9)
    weighted = [(upload.vectors["weights"], upload.weight) for upload in uploads]
    wanted = [
        weighted_mean(weighted),
        clipped_mean(weighted, START, 5.0),
        median(weighted),
        trimmed_mean(weighted, 2),  # floor(0.25 · 9)
    ]
    for how, vector in zip(RULES, wanted, strict=True):
        found = combine(setup_of(AggregationOptions(**how)), 1, START, uploads, "weights")
        assert torch.equal(found, vector)
    assert len({tuple(vector.tolist()) for vector in wanted}) == len(RULES)


def test_the_mean_is_the_plain_formula_to_the_bit() -> None:
    uploads = uploads_of(7)
    total = torch.zeros(D, dtype=torch.float64)
    for upload in uploads:
        total += upload.weight * upload.vectors["weights"].double()
    wanted = (total / sum(upload.weight for upload in uploads)).float()
    assert torch.equal(
        combine(setup_of(AggregationOptions()), 1, START, uploads, "weights"), wanted
    )
    assert torch.equal(mean_upload(uploads, "weights"), wanted)


N, BYTES = 30, 4 * 30 * 50
"""As many uploads, and what 50 of their coordinates take: three chunks of the 120 there are."""


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        (weighted_mean, 1),
        (lambda sent: clipped_mean(sent, START, 5.0), 1),
        (lambda sent: median(sent, BYTES), 4),
        (lambda sent: trimmed_mean(sent, 7, BYTES), 4),
    ],
    ids=[rule["rule"] for rule in RULES],
)
def test_no_more_than_two_uploads_are_in_memory(
    rule: Callable[[Sent], Tensor], passes: int
) -> None:
    uploads = uploads_of(N)
    disk = Disk(uploads)

    found = rule(Sent(disk, "weights"))

    assert torch.equal(found, rule(Sent(uploads, "weights")))
    assert (disk.most, disk.alive) == (2, 0)
    assert disk.reads == N * passes


@every_rule
@pytest.mark.parametrize("method", ["fedavg", "pflalign"])
def test_methods_hand_on_the_rule_of_the_recipe(method: str, how: dict[str, Any]) -> None:
    layout = AdapterLayout.of([("q", "A", (D // 2,)), ("q", "B", (D // 2,))])
    chosen = AggregationOptions(**how)
    setup = Setup(layout, 5, 0, options(), chosen)
    rules = METHODS[method](METHOD_OPTIONS[method].model_validate({"name": method}), setup)
    server, uploads = rules.init_server(START), uploads_of(5)
    before = server.vectors["global_weights"].clone()

    after = rules.aggregate(server, uploads, 1)

    wanted = combine(setup, 1, START, uploads, "weights")
    assert torch.equal(after.vectors["global_weights"], wanted)
    assert torch.equal(server.vectors["global_weights"], before)
    assert torch.equal(uploads[4].vectors["weights"], uploads_of(5)[4].vectors["weights"])


def test_a_setup_that_names_no_rule_means_the_mean() -> None:
    setup = Setup(AdapterLayout.of([]), 1, 0, options())
    assert setup.aggregation == AggregationOptions(rule="mean")


@every_rule
def test_an_upload_that_is_not_finite_is_refused(how: dict[str, Any]) -> None:
    uploads = uploads_of(3)
    uploads[1].vectors["weights"][7] = torch.inf
    with pytest.raises(AggregationError) as caught:
        combine(setup_of(AggregationOptions(**how)), 1, START, uploads, "weights")
    assert caught.value.message == (
        "uploads, here in the order of client ids, must be finite: "
        "1 of 120 numbers of upload 2 are not, the first is inf at 7"
    )


def reference(how: dict[str, Any], changes: np.ndarray, weights: list[float]) -> np.ndarray:
    match how["rule"]:
        case "mean":
            return np.average(changes, axis=0, weights=weights)
        case "clipped_mean":
            return reference_rules.clipped_mean(changes, weights, how["clip_norm"])
        case "median":
            return reference_rules.median(changes)
        case _:
            return reference_rules.trimmed_mean(changes, int(how["trim_fraction"] * len(changes)))


def each_as_recipe(how: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in how.items():
        yield f"aggregation.{key}", value


@pytest.mark.parametrize("method", ["fedavg", "pflalign"])
@pytest.mark.parametrize(
    "how",
    [
        *RULES[:1],
        {"rule": "clipped_mean", "clip_norm": 0.02},
        RULES[2],
        {"rule": "trimmed_mean", "trim_fraction": 0.4},
    ],
    ids=[rule["rule"] for rule in RULES],
)
def test_a_run_follows_its_rule_to_the_end(
    tmp_path: Path, method: str, how: dict[str, Any]
) -> None:
    changes = {"method.name": method, "training.learning_rate": 1.0, **dict(each_as_recipe(how))}

    def run(rounds: int) -> Path:
        folder = tmp_path / f"of-{rounds}"
        folder.mkdir()
        recipe = tiny_recipe(folder, **changes, **{"federation.rounds": rounds})
        result = finetune(load_recipe(recipe))
        assert len(result.clients) == 3
        return result.folder

    def of(folder: Path, where: str, round: int, name: str) -> Tensor:
        return load_file(folder / where / f"state-{round}.safetensors")[name]

    one, two = run(1), run(2)
    before, after = of(one, "server", 1, "global_weights"), of(two, "server", 2, "global_weights")
    ends = [of(two, f"clients/{c}", 2, "weights") for c in ("alice", "bob", "carol")]
    moves = np.stack([(end.double() - before.double()).numpy() for end in ends])
    if how["rule"] == "clipped_mean":
        assert np.linalg.norm(moves, axis=1).min() > how["clip_norm"]
    wanted = before.double().numpy() + reference(how, moves, [5.0, 5.0, 5.0])
    np.testing.assert_allclose(after.double().numpy(), wanted, rtol=2e-7, atol=1e-10)

    shown = f"\naggregation:\n  rule: {how['rule']}\n"
    assert shown in (two / "recipe.resolved.yaml").read_text()
    assert shown in (two / "adapters" / "alice" / "README.md").read_text()


@pytest.mark.parametrize(("fraction", "told"), [(0.5, True), (1.0, False)])
def test_a_rule_that_leaves_nobody_out_is_told(tmp_path: Path, fraction: float, told: bool) -> None:
    """Of three clients a half are two."""

    notes: list[str] = []

    class Noted(Watch):
        def note(self, text: str) -> None:
            notes.append(text)

    changes = {"federation.rounds": 1, "federation.fraction_train": fraction}
    recipe = tiny_recipe(tmp_path, **changes, **{"aggregation.rule": "median"})
    finetune(load_recipe(recipe), Noted())
    said = AggregationOptions(rule="median").bears_none(2)
    assert said is not None
    assert (said in notes) == told

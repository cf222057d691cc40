"""What a diagnosed turn tells, against a plain loop over the same steps; and that it only looks."""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfl_lm.federation.messages import Update
from pfl_lm.finetune import finetune
from pfl_lm.layout import AdapterLayout, Vector
from pfl_lm.methods import METHODS
from pfl_lm.quantities import QUANTITIES, WHOLE, key, told
from pfl_lm.recipe import load_recipe
from pfl_lm.report.tracking import TensorBoard
from pfl_lm.train import LocalTrainer, TurnDiagnostics
from tests.same import facts_in, results_in
from tests.tiny import tiny_recipe
from tests.train.parts import RATE, Gradients, mechanisms, offset_of, turn_of
from tests.world import World, make_world

STEPS = 4


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def diagnosed(world: World, **training: Any) -> LocalTrainer:
    run = world.trainer(steps=STEPS, **training)
    run.diagnostics = TurnDiagnostics(world.adapter.layout)
    return run


def layers(world: World) -> dict[str, np.ndarray[Any, Any]]:
    """Return the positions of each layer, told by the names of the modules."""
    found: dict[str, list[int]] = {"all": list(range(len(world.start)))}
    for entry in world.adapter.layout.entries:
        name = entry.module.split("layers.")[1].split(".")[0]
        found.setdefault(name, []).extend(range(entry.start, entry.stop))
    return {name: np.array(positions) for name, positions in found.items()}


def plain_turn(
    world: World, start: Vector, offset: Vector, *, update: bool
) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Take the steps of Algorithm 1 one by one, in float64, and note all there is to see."""
    run = world.trainer(steps=STEPS)
    w, D = start.double().numpy(), offset.double().numpy()
    m, v, P = (np.zeros_like(w) for _ in range(3))
    first, second = np.zeros_like(w), np.zeros_like(w)
    seen: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in "gusPγ"}
    for t, [batch] in enumerate(run.windows(STEPS), 1):
        _, grad = run.loss_and_grad(torch.tensor(w, dtype=torch.float32), batch)
        g = grad.double().numpy()
        m, v_before = 0.9 * m + 0.1 * g, v
        v = 0.9 * v + 0.1 * g * g
        with np.errstate(invalid="ignore", divide="ignore"):
            P = np.where(v > 0, (0.9 * v_before * P + 0.1 * m * m) / v, 0)
            z = np.where(m == 0, 0, np.abs(m) / np.sqrt(2 * np.maximum(v - m * m, 0)))
        gamma = 0.5 - 0.5 * np.vectorize(math.erf)(z) * np.sign(-m * D)
        u = g
        if update:  # AdamW without decay
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            u = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        for name, value in zip("gusPγ", (g, u, P * u, P, gamma), strict=True):
            seen[name].append(value)
        w = w - RATE_OF[update] * P * u - gamma * D / STEPS
    return seen | {"w": [w]}


RATE_OF = {False: RATE, True: 0.01}


@pytest.mark.parametrize("update", [False, True])
def test_every_number_is_that_of_a_plain_loop(world: World, update: bool) -> None:
    start, offset, w_g = world.vector(), offset_of(world), world.vector(seed=9)
    how = {"target": "update", "rate": RATE_OF[update]} if update else {}
    optimizer = {"optimizer": "adamw", "learning_rate": RATE_OF[update]} if update else {}
    run = diagnosed(world, **optimizer)
    turn = turn_of(world, steps=STEPS, offset=offset)
    end = run.train(start, steps=STEPS, callbacks=mechanisms(world, turn, **how))
    assert run.diagnostics is not None
    found = run.diagnostics.summary({"global_weights": w_g})

    seen = plain_turn(world, start, offset, update=update)
    g, u, s, P, gamma = (np.stack(seen[name]) for name in "gusPγ")
    w, D = seen["w"][0], offset.double().numpy()
    np.testing.assert_allclose(end.numpy(), w, atol=2e-5)
    moved, drift = w - start.double().numpy(), w - w_g.double().numpy()
    expected = {}
    for layer, at in layers(world).items():
        numbers = {
            "preconditioner_mean": P[:, at].mean(),
            "gamma_mean": gamma[:, at].mean(),
            "gamma_std": gamma[:, at].std(axis=1).mean(),
            "offset_norm": np.linalg.norm(D[at]),
            "gradient_variance": g[:, at].var(axis=0, ddof=1).mean(),
            "step_variance": s[:, at].var(axis=0, ddof=1).mean(),
            "cosine": moved[at] @ D[at] / np.linalg.norm(moved[at]) / np.linalg.norm(D[at]),
            "drift": np.linalg.norm(drift[at]),
        }
        if update:
            numbers["update_variance"] = u[:, at].var(axis=0, ddof=1).mean()
        expected |= {key(name, layer): value for name, value in numbers.items()}
    assert found.keys() == expected.keys()
    assert {key("drift", "0"), key("drift", "1"), key("drift", "all")} < found.keys()
    assert found == pytest.approx(expected, rel=2e-3 if update else 2e-4)


def test_variances_by_hand(world: World) -> None:
    """Gradients of 1, 2, 3 and 4 everywhere have the variance 5/3."""
    run = diagnosed(world)
    turn = turn_of(world, steps=STEPS)

    def counted(step: int, grads: Vector) -> None:
        grads.fill_(step + 1.0)

    # What looks on first stands before what changes gradients, so the change is made in backward.
    hook = _Backward(counted)
    run.train(world.vector(), steps=STEPS, callbacks=[*mechanisms(world, turn), hook])
    assert run.diagnostics is not None
    found = run.diagnostics.summary({})
    assert found[key("gradient_variance", "all")] == pytest.approx(5 / 3)
    assert key("drift", "all") not in found


class _Backward(Gradients):
    def on_before_optimizer_step(self, *args: Any) -> None:
        pass

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.change(self.steps, pl_module.adapter.grads)
        self.steps += 1


def test_a_gradient_that_is_not_finite_does_not_count(world: World) -> None:
    def broken(step: int, grads: Vector) -> None:
        grads.fill_(float("nan") if step == 1 else step)

    run, turn = diagnosed(world), turn_of(world, steps=STEPS)
    run.train(world.vector(), steps=STEPS, callbacks=[*mechanisms(world, turn), _Backward(broken)])
    assert run.diagnostics is not None
    found = run.diagnostics.summary({})
    assert turn.skipped == 1
    assert found[key("gradient_variance", "0")] == pytest.approx(np.var([0, 2, 3], ddof=1))
    assert found[key("gamma_mean", WHOLE)] == pytest.approx(turn.summary()["gamma_mean"])


def test_what_is_not_defined_is_left_out(world: World) -> None:
    run, zero = diagnosed(world), torch.zeros(len(world.start))
    run.train(
        world.vector(), steps=1, callbacks=mechanisms(world, turn_of(world, steps=1, offset=zero))
    )
    assert run.diagnostics is not None
    found = {quantity for _, quantity, _ in told(run.diagnostics.summary({}))}
    assert found == {"preconditioner_mean", "gamma_mean", "gamma_std", "offset_norm"}
    assert diagnosed(world).diagnostics.summary({}) == {}  # type: ignore[union-attr]


def test_layers_are_told_from_the_modules_names() -> None:
    layout = AdapterLayout.of(
        [
            ("model.layers.10.q", "A", (1, 2)),
            ("head", "A", (1, 3)),
            ("model.layers.10.mlp.experts.3.w", "B", (2, 1)),
            ("model.layers.2.q", "B", (4, 1)),
            ("model.layers.2.v", "B", (1, 1)),
        ]
    )
    assert layout.layers == {
        10: (slice(0, 2), slice(5, 7)),
        None: (slice(2, 5),),
        2: (slice(7, 12),),
    }
    run = TurnDiagnostics(layout)
    end = torch.arange(12.0)
    run.around(torch.zeros(12), [])
    run.ended(end)
    found = list(told(run.summary({"global_weights": torch.zeros(12)})))
    assert [layer for layer, _, _ in found] == ["all", "2", "10", "rest"]
    norms = [506, 415, 62, 29]
    assert [value for _, _, value in found] == pytest.approx([math.sqrt(n) for n in norms])


@pytest.mark.parametrize("shared", ["A", "B"])
def test_drift_of_half_an_adapter_is_that_of_the_half_which_is_shared(
    world: World, shared: Any
) -> None:
    layout, end = world.adapter.layout, world.vector()
    run = TurnDiagnostics(layout)
    run.around(world.start, [])
    run.ended(end)
    there = layout.factor(world.vector(seed=4), shared)
    found = run.summary({f"global_{shared}": there})
    expected = float((layout.factor(end, shared) - there).norm())
    assert found[key("drift", "all")] == pytest.approx(expected, rel=1e-6)


# --- within runs ------------------------------------------------------------------------------


def without_diagnostics(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Return a ledger's facts, each turn's summary without its diagnostics."""
    facts = facts_in(folder)
    for i, row in enumerate(facts["turns"]):
        [summary] = [json.loads(value) for value in row if str(value).startswith("{")]
        kept = {name: x for name, x in summary.items() if not name.startswith("diagnostics/")}
        facts["turns"][i] = tuple(
            json.dumps(kept, sort_keys=True) if str(value).startswith("{") else value
            for value in row
        )
    return facts


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_run_ends_at_the_same_bits_with_and_without(tmp_path: Path, method: str) -> None:
    rate = {"training.optimizer": None, "training.learning_rate": 0.01}
    folders = {}
    for on in (True, False):
        place = tmp_path / str(on)
        place.mkdir()
        recipe = tiny_recipe(
            place, **rate, **{"method": {"name": method}, "runtime.diagnostics": on}
        )
        folders[on] = finetune(load_recipe(recipe)).folder
    one, other = folders[True], folders[False]
    files, others = (results_in(folder) for folder in (one, other))
    assert files.keys() == others.keys()
    assert [name for name in files if files[name] != others[name]] == []
    assert without_diagnostics(one) == facts_in(other)
    with closing(sqlite3.connect(one / "federation.sqlite")) as ledger:
        summaries = [json.loads(s) for (s,) in ledger.execute("SELECT summary FROM turns")]
    seen = [{quantity for _, quantity, _ in told(summary)} for summary in summaries]
    assert all({"gradient_variance", "drift"} <= quantities for quantities in seen)
    if method == "pflalign":
        assert seen[-1] == {*QUANTITIES} - {"update_variance"}
        for summary in summaries:
            assert summary[key("drift", "all")] == pytest.approx(summary["offset_norm"])
            assert summary[key("offset_norm", "all")] == pytest.approx(
                summary["offset_norm_before"]
            )
            assert summary[key("gamma_mean", "all")] == pytest.approx(summary["gamma_mean"])


def test_tensorboard_gets_the_whole_adapters_numbers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, float] = {}
    monkeypatch.setattr(TensorBoard, "_write", lambda self, step, numbers: written.update(numbers))
    summary = {"loss_last": 2.0, key("drift", "all"): 1.0, key("drift", "11"): 3.0}
    TensorBoard(tmp_path, {"é": "e"}).turn(Update("r", 1, "é", summary=summary, seconds=4.0))
    assert written == {"loss_last/e": 2.0, "diagnostics/drift/all/e": 1.0, "seconds/e": 4.0}


@pytest.mark.parametrize(
    "name",
    [
        *("diagnostics/drift/-1", "diagnostics/drift/1\n", "diagnostics/x/1", "drift"),
        *("diagnostics", f"diagnostics/drift/{'9' * 7}", "diagnostics/drift/٣"),
        *("diagnostics/drift/all/1", "diagnostics/drift/01"),
    ],
)
def test_strange_names_and_numbers_are_passed_over(name: str) -> None:
    good = key("drift", "7")
    assert list(told({name: 1.0, good: 2.0})) == [("7", "drift", 2.0)]
    for value in (math.nan, math.inf, 10**400):
        assert list(told({good: value})) == []

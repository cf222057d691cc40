"""`pfl-lm diagnose`: the figure of each client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

import pfl_lm.diagnose
from pfl_lm.diagnose import client_figures
from pfl_lm.evaluate.pac_bayes import SIGMAS, figure, fixed_model_figure, least_figure
from pfl_lm.model.states import Row
from pfl_lm.model.trunk import Trunk
from pfl_lm.resume import run_recipe
from tests.cli.diagnosed import cli, words
from tests.interruptions import whole


def test_the_figures_come_from_the_exported_adapters(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rows are claimed, and errors given, so that the figures are not all 1."""
    asked: list[tuple[float, int]] = []

    def noisy(*_: Any, sigma: float, samples: int, **__: Any) -> float:
        asked.append((sigma, samples))
        return 0.2 if sigma < 0.1 else 0.9

    monkeypatch.setattr(pfl_lm.diagnose, "noisy_token_error", noisy)
    monkeypatch.setattr(pfl_lm.diagnose, "token_error", lambda *_, **__: 0.3)
    monkeypatch.setattr(pfl_lm.diagnose._Rows, "n", 5000)
    found = list(client_figures(run_recipe(run), 4, lambda text: None))
    assert [each.client for each in found] == ["alice", "bob", "carol"]
    for each in found:
        figures = {
            sigma: figure(
                0.2 if sigma < 0.1 else 0.9,
                4 * 5000,
                each.distance**2 / 2 / sigma**2,
                5000,
            )
            for sigma in SIGMAS
        }
        assert each.sigma == min(figures, key=lambda sigma: figures[sigma])
        assert each.figure == pytest.approx(min(figures.values()))
        assert each.error == 0.2
        assert each.divergence == pytest.approx(each.distance**2 / 2 / each.sigma**2)
        assert each.backbone == fixed_model_figure(0.3, 5000)
    # σ that could not have given less were not measured.
    assert 3 <= len(asked) < 3 * len(SIGMAS)
    assert {samples for _, samples in asked} == {4}
    assert 0.001 not in {sigma for sigma, _ in asked}
    assert least_figure(found[0].distance ** 2 / 2 / 0.001**2, 5000) > found[0].figure


def test_distances_are_to_the_adapter_that_the_run_began_with(run: Path, tmp_path: Path) -> None:
    """A run that changes nothing keeps the untouched adapter: it is at distance 0, and its KL 0."""
    still = whole(tmp_path / "still", **{"training.learning_rate": 1e-30})
    start = load_file(still / "adapters" / "alice" / "adapter_model.safetensors")
    for each in client_figures(run_recipe(still), 1, lambda text: None):
        assert (each.candidate, each.distance, each.divergence) == ("base", 0.0, 0.0)
        assert each.error is not None
    for each in client_figures(run_recipe(run), 1, lambda text: None):
        w = load_file(run / "adapters" / each.client / "adapter_model.safetensors")
        squares = [float((w[key].double() - start[key].double()).square().sum()) for key in w]
        assert each.distance == pytest.approx(sum(squares) ** 0.5, rel=1e-9)
        assert each.distance > 0.1


def test_the_figures_are_shown_with_what_they_are_not(run: Path) -> None:
    code, stdout, stderr = cli(run, "--samples", 1)
    assert (code, stderr) == (0, "")
    lines = words(stdout)
    assert "client its model rows ‖w-w₀‖ σ KL error figure backbone" in lines
    [alice] = [line for line in lines if line.startswith("alice ")]
    # Five rows: not even without an error would the figure be small, and a random model errs.
    assert alice.startswith("alice realigned 5 ")
    assert alice.endswith(" 1.000 1.000 vacuous")
    assert "3 of 3 figures are vacuous" in lines
    assert "NOT the bound of the pFLAlign paper" in stdout
    assert "With probability 0.95" in stdout
    assert cli(run, "--samples", 1)[1] == stdout


@pytest.mark.parametrize(
    ("candidate", "value", "verdict"),
    [
        ("local", 1.0, "vacuous"),
        ("local", 0.9991, "vacuous"),
        ("local", 0.7, "not vacuous, but above the backbone's"),
        ("local", 0.5, "not vacuous, and below the backbone's"),
        ("base", 0.7, "not vacuous; it keeps the backbone"),
    ],
)
def test_verdicts(candidate: str, value: float, verdict: str) -> None:
    each = pfl_lm.diagnose.ClientFigure("a", candidate, 9, 0.1, 0.1, 1.0, 0.2, value, 0.6)
    assert each.verdict == verdict


def test_no_figures_where_noise_protects_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    lever = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-3}
    folder = whole(tmp_path, **{"privacy.record_level": lever})
    code, stdout, _ = cli(folder)
    assert code == 0
    lines = words(stdout)
    assert (
        "next: none can be: `privacy.record_level` does not account for what they would tell"
        in (lines)
    )
    assert lines[-2:] == [
        "no PAC-Bayes style figures: they read the train rows without noise, which",
        "`privacy.record_level` does not account for",
    ]


def test_a_row_goes_through_the_layers_below_the_adapter_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many noises and σ it is measured at; and the figures stay what they are without."""
    monkeypatch.setattr(pfl_lm.diagnose._Rows, "n", 5000)  # so that σ are measured at all
    made: list[Row] = []
    make = Trunk._made

    def counted(self: Trunk, row: Row) -> Tensor:
        made.append(row)
        return make(self, row)

    monkeypatch.setattr(Trunk, "_made", counted)
    run = run_recipe(whole(tmp_path, **{"adapter.layers_to_transform": [1]}))
    made.clear()
    found = list(client_figures(run, 2, lambda text: None))
    assert len(made) > 3
    assert len(set(made)) > len(made) - 3  # but for those of the check that it can be done
    off = run.recipe.runtime.model_copy(update={"trunk_cache": "off"})
    without = replace(run, recipe=run.recipe.model_copy(update={"runtime": off}))
    made.clear()
    assert list(client_figures(without, 2, lambda text: None)) == found
    assert made == []

"""The section ``aggregation``: which options go with which rule, and what is refused how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pfl_lm.errors import RecipeError
from pfl_lm.recipe import AggregationOptions, load_recipe
from pfl_lm.recipe.yaml12 import read_yaml
from tests.recipe.minimal import load


@pytest.mark.parametrize(
    ("overrides", "rule", "clip_norm", "trim_fraction"),
    [
        ([], "mean", None, None),
        (["aggregation.rule=mean"], "mean", None, None),
        (["aggregation.rule=median"], "median", None, None),
        (["aggregation.rule=clipped_mean", "aggregation.clip_norm=2"], "clipped_mean", 2.0, None),
        (["aggregation.rule=trimmed_mean"], "trimmed_mean", None, 0.1),
        (
            ["aggregation.rule=trimmed_mean", "aggregation.trim_fraction=0"],
            "trimmed_mean",
            None,
            0.0,
        ),
    ],
)
def test_rules_and_their_options(
    tmp_path: Path,
    overrides: list[str],
    rule: str,
    clip_norm: float | None,
    trim_fraction: float | None,
) -> None:
    loaded = load(tmp_path, *overrides)
    found = loaded.recipe.aggregation
    assert (found.rule, found.clip_norm, found.trim_fraction) == (rule, clip_norm, trim_fraction)

    again = tmp_path / "again.yaml"
    again.write_text(loaded.resolved(), encoding="utf-8")
    shown = read_yaml(loaded.resolved().encode(), "resolved").data["aggregation"]
    assert shown == {"rule": rule, "clip_norm": clip_norm, "trim_fraction": trim_fraction}
    assert load_recipe(again).recipe == loaded.recipe


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["aggregation.rule=clipped_mean"],
            "aggregation.clip_norm: missing: `rule: clipped_mean` needs to know how long a change "
            "may be, for example `clip_norm: 1.0`",
        ),
        (
            ["aggregation.clip_norm=1.0"],
            "override aggregation.clip_norm=1.0: goes with `rule: clipped_mean` only, not with "
            "`mean`",
        ),
        (
            ["aggregation.rule=median", "aggregation.clip_norm=1.0"],
            "override aggregation.clip_norm=1.0: goes with `rule: clipped_mean` only, not with "
            "`median`",
        ),
        (
            ["aggregation.rule=median", "aggregation.trim_fraction=0.1"],
            "override aggregation.trim_fraction=0.1: goes with `rule: trimmed_mean` only, not with "
            "`median`",
        ),
        (
            ["aggregation={rule: clipped_mean, clip_norm: 0}"],
            "override aggregation={rule: clipped_mean, clip_norm: 0}: aggregation.clip_norm: must "
            "be a number greater than 0, got 0",
        ),
        (
            ["aggregation={rule: clipped_mean, clip_norm: .inf}"],
            "override aggregation={rule: clipped_mean, clip_norm: .inf}: aggregation.clip_norm: "
            "must be a finite number greater than 0, got inf",
        ),
        (
            ["aggregation={rule: trimmed_mean, trim_fraction: 0.5}"],
            "override aggregation={rule: trimmed_mean, trim_fraction: 0.5}: "
            "aggregation.trim_fraction: must be a number of at least 0 and less than 0.5, got 0.5",
        ),
        (
            ["aggregation.rule=krum"],
            "override aggregation.rule=krum: must be one of mean, clipped_mean, median, "
            "trimmed_mean, got 'krum'",
        ),
        (
            ["method.name=local", "aggregation.rule=median"],
            "override aggregation.rule=median: `local` sends nothing to the server, so no rule has "
            "anything to work on; leave `aggregation` out, or choose another method",
        ),
        (
            ["aggregation.trim=0.2"],
            "override aggregation.trim=0.2: unknown key. Did you mean `aggregation.trim_fraction`?",
        ),
        (
            ["federation.clip=0.2"],
            "override federation.clip=0.2: unknown key. Did you mean `aggregation.clip_norm`?",
        ),
        (
            ["aggregation=median"],
            "override aggregation=median: got 'median', expected a mapping such as "
            "`aggregation: {rule: median}`",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, *overrides)
    assert caught.value.message.splitlines()[1:] == [f"  {said}"]


def test_all_problems_of_the_section_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "aggregation={rule: median, clip_norm: 1, trim_fraction: 0.1, trim: 1}")
    assert [line.rpartition("}: ")[2] for line in caught.value.message.splitlines()[1:]] == [
        "aggregation.clip_norm: goes with `rule: clipped_mean` only, not with `median`",
        "aggregation.trim_fraction: goes with `rule: trimmed_mean` only, not with `median`",
        "aggregation.trim: unknown key. Did you mean `aggregation.trim_fraction`?",
    ]


def test_local_with_the_plain_mean_is_fine(tmp_path: Path) -> None:
    recipe = load(tmp_path, "method.name=local", "aggregation.rule=mean").recipe
    assert recipe.aggregation.rule == "mean"


@pytest.mark.parametrize(
    ("fraction", "n", "cut"),
    [
        *((0.1, n, n // 10) for n in (1, 9, 10, 19, 20, 1000)),
        (0.29, 100, 29),  # where 0.29 * 100 is 28.999999999999996
        (0.07, 100, 7),
        (1e-05, 100_000, 1),
        (0.25, 3, 0),
        (0.3, 10, 3),
        (0.49999999999999994, 2, 0),
        (0.499, 1000, 499),
        (0.0, 50, 0),
    ],
)
def test_a_fraction_counts_as_it_is_written(fraction: float, n: int, cut: int) -> None:
    options = AggregationOptions(rule="trimmed_mean", trim_fraction=fraction)
    assert options.n_trimmed(n) == cut


def test_something_is_always_left() -> None:
    options = AggregationOptions(rule="trimmed_mean", trim_fraction=0.49999999999999994)
    assert all(2 * options.n_trimmed(n) < n for n in range(1, 500))


@pytest.mark.parametrize(
    ("how", "n", "said"),
    [
        ({"rule": "mean"}, 1, None),
        ({"rule": "clipped_mean", "clip_norm": 1.0}, 1, None),
        (
            {"rule": "median"},
            1,
            "aggregation.rule: with 1 upload a round, median is their unweighted mean; it needs 3 "
            "to bear a bad one",
        ),
        (
            {"rule": "median"},
            2,
            "aggregation.rule: with 2 uploads a round, median is their unweighted mean; it needs 3 "
            "to bear a bad one",
        ),
        ({"rule": "median"}, 3, None),
        (
            {"rule": "trimmed_mean"},
            9,
            "aggregation.rule: with 9 uploads a round, trimmed_mean cuts floor(0.1 * 9) = 0: it is "
            "their unweighted mean",
        ),
        ({"rule": "trimmed_mean"}, 10, None),
    ],
)
def test_a_rule_that_bears_nothing_is_told(how: dict[str, Any], n: int, said: str | None) -> None:
    assert AggregationOptions(**how).bears_none(n) == said

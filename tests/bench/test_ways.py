"""Every way does the same work: the same rows, the same steps, the same place to end at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pfl_lm.bench.case import Case
from pfl_lm.bench.clock import Stopwatch
from pfl_lm.bench.ways import FIT, OURS, SAME_LOOP, read_against
from pfl_lm.errors import PflError, RecipeError
from tests.bench.cases import TOP, taken, tiny_case, ways

WORK: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {
        "training.optimizer": "adamw",
        "training.learning_rate": 0.004,
        "method": {"name": "fedavg"},
    },
    "accumulated": {"training.gradient_accumulation_steps": 3, "training.max_steps": 3},
    "steep": {"adapter.lora_alpha": 4000, "training.learning_rate": 1e-6},
    "dropout": {"adapter.lora_dropout": 0.3},
}
"""Five train rows in batches of two: passes end in a batch of one. A steep one would be clipped."""


def start(case: Case) -> Tensor:
    with case.adapter() as adapter:
        return adapter.read()


def apart(case: Case, end: Tensor | None, fit: Tensor) -> float:
    """Return how far two ends lie apart, as a share of the way that one of them went."""
    assert end is not None
    return float((end - fit).norm() / (fit - start(case)).norm())


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("layers", [TOP, {}], ids=["top", "all"])
def test_the_loop_with_the_same_loss_ends_at_the_fits_bits(
    tmp_path: Path, work: str, layers: dict[str, Any]
) -> None:
    case = tiny_case(tmp_path, **{**WORK[work], **layers})
    fit, loop = (taken(case, ways(case)[name]).end for name in (FIT, SAME_LOOP))
    assert fit is not None
    assert loop is not None
    assert torch.equal(fit, loop)
    assert not torch.equal(fit, start(case))


@pytest.mark.parametrize("work", ["sgd", "adamw", "accumulated", "steep"])
@pytest.mark.parametrize("way", ["loop", "trainer", "reload"])
def test_what_others_write_ends_there_but_for_rounding(tmp_path: Path, work: str, way: str) -> None:
    case = tiny_case(tmp_path, **{**WORK[work], **TOP, "training.max_steps": 5})
    fit = taken(case, ways(case)[FIT]).end
    assert fit is not None
    assert apart(case, taken(case, ways(case)[way]).end, fit) < 1e-4


def test_another_order_of_rows_would_be_seen(tmp_path: Path) -> None:
    """What the tolerance above has to tell apart."""
    case = tiny_case(tmp_path, **TOP)
    other = tiny_case(tmp_path / "other", ["seed=8"], **TOP)
    ends = [taken(each, ways(each)["trainer"]).end for each in (case, case, other)]
    assert ends[0] is not None
    assert apart(case, ends[1], ends[0]) == 0
    assert apart(case, ends[2], ends[0]) > 0.1


def test_in_all_layers_the_loop_trains_all_of_them(tmp_path: Path) -> None:
    case = tiny_case(tmp_path, **TOP)
    everywhere = tiny_case(tmp_path / "all")
    end = taken(case, ways(case)["loop, all layers"]).end
    fit = taken(everywhere, ways(everywhere)[FIT]).end
    assert end is not None
    assert fit is not None
    assert apart(everywhere, end, fit) < 1e-4


def test_ways_that_would_be_the_same_are_left_out(tmp_path: Path) -> None:
    others = {FIT, SAME_LOOP, "loop", "trainer", "reload"}
    trunk = {"pfl-lm, rows new", "pfl-lm, no trunk"}
    assert ways(tiny_case(tmp_path, **TOP)).keys() == {OURS, *others, *trunk, "loop, all layers"}
    assert ways(tiny_case(tmp_path)).keys() == {OURS, *others}
    off = tiny_case(tmp_path, ["runtime.trunk_cache=off"], **TOP)
    assert ways(off).keys() == {OURS, *others, "loop, all layers"}
    assert ways(off, ["reload"]).keys() == {OURS, "reload"}


@pytest.mark.parametrize("way", [OURS, "pfl-lm, no trunk", FIT, SAME_LOOP, "loop", "trainer"])
def test_every_step_is_timed_once(tmp_path: Path, way: str) -> None:
    case = tiny_case(tmp_path, **{**TOP, **WORK["accumulated"]})
    stopwatch = Stopwatch()
    taken(case, ways(case)[way], stopwatch)
    assert stopwatch.laps == 3
    assert stopwatch.wall > 0


def test_both_fits_of_a_turn_are_timed(tmp_path: Path) -> None:
    case = tiny_case(tmp_path, **{**TOP, "method": {"name": "ditto"}})
    stopwatch = Stopwatch()
    taken(case, ways(case)[OURS], stopwatch)
    assert case.fits == 2
    assert stopwatch.laps == 4


def test_rows_are_remembered_by_one_way_and_new_to_the_other(tmp_path: Path) -> None:
    case = tiny_case(tmp_path, **TOP)
    assert case.trunk is not None
    taken(case, ways(case)["pfl-lm, rows new"])
    taken(case, ways(case)["pfl-lm, no trunk"])
    assert case.trunk.n_bytes == 0
    taken(case, ways(case)[OURS])
    assert case.trunk.n_bytes > 0


def test_a_turn_says_what_it_sends(tmp_path: Path) -> None:
    case = tiny_case(tmp_path)
    did = taken(case, ways(case)[OURS])
    assert did.up == did.down == 4 * len(start(case))
    assert taken(case, ways(case)["loop"]).up is None


def test_what_is_sent_is_not_what_was_received(tmp_path: Path) -> None:
    case = tiny_case(tmp_path, **{"method": {"name": "scaffold"}})
    did, d = taken(case, ways(case)[OURS]), len(start(case))
    assert (did.up, did.down) == (4 * d, 2 * 4 * d)  # weights; weights and a control


def test_nothing_stays_in_the_backbone_or_on_the_disk(tmp_path: Path) -> None:
    case = tiny_case(tmp_path, **TOP)
    files = sorted(tmp_path.iterdir())
    names = [name for name, _ in case.backbone.model.named_parameters()]
    for way in ways(case).values():
        taken(case, way)
        assert [name for name, _ in case.backbone.model.named_parameters()] == names
    assert sorted(tmp_path.iterdir()) == files


def test_the_client_in_the_middle_is_taken(tmp_path: Path) -> None:
    case = tiny_case(tmp_path)
    lengths = {
        client.id: sum(len(row.input_ids) for row in client.train) / len(client.train)
        for client in case.dataset
    }
    assert sorted(lengths.values())[1] == lengths[case.client]
    assert len(set(lengths.values())) == 3


def test_a_rate_that_is_still_to_be_chosen_is_a_number_here(tmp_path: Path) -> None:
    case = tiny_case(tmp_path, ["training.learning_rate=auto"], steps=3)
    assert case.recipe.training.learning_rate == 0.001
    assert case.recipe.training.max_steps == case.steps == 3


def test_epochs_are_counted_in_steps(tmp_path: Path) -> None:
    case = tiny_case(tmp_path, ["training.max_steps=null", "training.local_epochs=2"])
    assert case.steps == 6  # twice five rows by two


def test_private_training_is_refused(tmp_path: Path) -> None:
    lever = "privacy.record_level={noise_multiplier: 1.0, max_grad_norm: 1.0, delta: 1e-3}"
    with pytest.raises(RecipeError, match=r"^privacy\.record_level: private steps are not meas"):
        tiny_case(tmp_path, [lever])


@pytest.mark.parametrize(
    ("given", "without"),
    [
        ("backbone.quantization=nf4", "backbone.quantization=none"),
        ("backbone.device_map=auto", "backbone.device_map=null"),
        ("training.gradient_checkpointing=true", "training.gradient_checkpointing=false"),
    ],
)
def test_what_not_every_loop_does_is_refused(tmp_path: Path, given: str, without: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny_case(tmp_path, [given])
    assert str(caught.value) == (
        f"{given.split('=')[0]}: is not measured, the loops beside pfl-lm's do not do it\n"
        f"  hint: leave it out for the measurement: {without}"
    )


def test_a_turn_that_fails_is_told(tmp_path: Path) -> None:
    case = tiny_case(tmp_path, ["training.learning_rate=1e30"], steps=4)
    with pytest.raises(PflError, match=rf"^client {case.client}: its turn has failed: "):
        taken(case, ways(case)[OURS])


def test_what_to_compare_with_is_read() -> None:
    assert read_against([]) == ["loop", "trainer", "reload"]
    assert read_against(["reload, loop"]) == ["reload", "loop"]
    assert read_against(["loop", "trainer"]) == ["loop", "trainer"]
    with pytest.raises(PflError) as caught:
        read_against(["loop,triner"])
    assert str(caught.value) == (
        "--against: 'triner' is none of loop, trainer, reload\n  hint: --against trainer"
    )

"""Who wins, for whom, and what may be said of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from pfl_lm.evaluate.bootstrap import paired_interval
from pfl_lm.evaluate.rates import choose_rate, own_validation
from pfl_lm.evaluate.standings import Standing, Standings, over_seeds, standings
from pfl_lm.evaluate.trials import Trial
from tests.trials import CLIENTS, outcome, trial

FEDAVG = [2.0, 2.1, 2.2, 2.3, 2.4, 2.5]
LOCAL = [2.5, 2.5, 2.5, 2.6, 2.6, 2.6]


def row(found: Standings, label: str) -> Standing:
    [only] = [each for each in found.methods if each.label == label]
    return only


# --- the choice of a rate ---------------------------------------------------------------------


def grid(**validations: float | None) -> list[Trial]:
    """Return trials by rate, named r1, r2 …; None has diverged."""
    return [
        trial("fedavg", None if loss is None else FEDAVG, rate=float(name[1:]), validation=loss)
        if loss is not None
        else trial("fedavg", rate=float(name[1:]))
        for name, loss in validations.items()
    ]


@pytest.mark.parametrize(
    ("trials", "chosen", "remark"),
    [
        (grid(r1=2.0, r2=1.5, r4=1.8), 2.0, ""),
        (grid(r1=1.0, r2=1.5, r4=1.8), 1.0, "the lowest rate tried: a lower one may be better"),
        (grid(r4=1.0, r2=1.5, r1=1.8), 4.0, "the highest rate tried: a higher one may be better"),
        (grid(r1=2.0, r2=1.5, r4=None), 2.0, ""),  # beyond it training diverges
        (grid(r1=2.0, r2=2.0, r4=2.0), 1.0, "the lowest rate tried: a lower one may be better"),
        (grid(r3=2.0), 3.0, "one rate only, not tuned"),
        (grid(r1=None, r2=None), None, "diverged at every rate"),
        ([*grid(r1=2.0), trial("fedavg", rate=2.0, state="missing")], 1.0, "not all rates tried"),
        ([trial("fedavg", rate=2.0, state="begun")], None, "not known yet"),
        (
            [trial("pflalign", FEDAVG, rate="auto"), trial("pflalign", LOCAL, rate=3.0)],
            "auto",
            "",
        ),
    ],
)
def test_a_rate_is_chosen_by_validation_and_doubts_are_said(
    trials: list[Trial], chosen: float | str | None, remark: str
) -> None:
    found = choose_rate(trials)
    assert found.chosen == chosen
    assert found.remark.startswith(remark)
    assert bool(found.remark) == bool(remark)
    assert found.settled == all(each.state in ("finished", "failed") for each in trials)


def test_a_rate_is_not_chosen_by_test() -> None:
    better_on_test = trial("fedavg", FEDAVG, rate=1.0, validation=3.0)
    better_on_validation = trial("fedavg", LOCAL, rate=2.0, validation=2.0)
    assert choose_rate([better_on_test, better_on_validation]).chosen == 2.0


def test_every_client_counts_once_in_the_choice() -> None:
    """By rows, client f would outweigh client a."""
    assert own_validation(outcome([1.0, 0, 0, 0, 0, 5.0])) == 1.0


def test_the_first_seed_chooses_and_the_others_follow() -> None:
    """With seed 1 the other rate would have been the better one; nobody asks."""
    trials = [
        trial("fedavg", FEDAVG, seed=3, rate=1.0, validation=1.0),
        trial("fedavg", LOCAL, seed=3, rate=2.0, validation=2.0),
        trial("fedavg", LOCAL, seed=1, rate=1.0, validation=2.0),
        trial("fedavg", FEDAVG, seed=1, rate=2.0, validation=1.0),
    ]
    found = row(standings(trials, [3, 1]), "fedavg")
    assert found.rate == 1.0
    assert found.losses.tolist() == [FEDAVG, LOCAL]
    assert [each.seed for each in found.trials] == [3, 1]
    assert found.validation == 1.5


# --- the table --------------------------------------------------------------------------------


def test_a_row_by_hand() -> None:
    base = [2.05] * 6
    trials = [
        trial("fedavg", FEDAVG, base=base, validation=1.0),
        trial("local", LOCAL, base=base, validation=2.0),
    ]
    found = standings(trials, [0])
    assert (found.split, found.clients, found.local) == ("test", CLIENTS, "local")
    assert found.rows.tolist() == [1, 2, 3, 4, 5, 6]
    fedavg = row(found, "fedavg")
    [told] = fedavg.spreads
    assert told.mean == pytest.approx(2.25)
    assert told.weighted == pytest.approx((2.0 + 4.2 + 6.6 + 9.2 + 12.0 + 15.0) / 21)
    assert told.worst == 2.5
    assert fedavg.harmed == (5,)
    assert fedavg.harmed_by_local == (0,)
    assert fedavg.own.tolist() == [[loss + 0.5 for loss in FEDAVG]]
    assert row(found, "local").harmed_by_local == (0,)
    assert found.base is not None
    assert found.base.losses.tolist() == [base]
    assert found.base.spreads[0].std == pytest.approx(0)


def test_without_test_rows_the_table_is_of_validation() -> None:
    found = standings([trial("fedavg", FEDAVG, splits=("validation",))], [0])
    assert found.split == "validation"
    assert found.methods[0].losses.tolist() == [FEDAVG]
    assert found.local is None
    assert found.methods[0].harmed_by_local == ()


def test_methods_come_best_first_by_validation_and_those_without_a_result_last() -> None:
    trials = [
        trial("fedadam"),
        trial("fedavg", FEDAVG, validation=3.0),
        trial("ditto", LOCAL, validation=2.0),  # worse on test
        trial("local", LOCAL, validation=4.0),
    ]
    found = standings(trials, [0])
    assert [each.label for each in found.methods] == ["ditto", "fedavg", "local", "fedadam"]
    against = {each.label: each.against_best for each in found.methods}
    assert {label: each.other for label, each in against.items() if each} == {
        "ditto": "fedavg",
        "fedavg": "ditto",
        "local": "ditto",
        "fedadam": "ditto",
    }


def test_the_better_of_two_local_ones_is_the_floor() -> None:
    trials = [
        trial("local-sgd", FEDAVG, validation=3.0),
        trial("local-adamw", LOCAL, validation=2.0),
        trial("fedavg", FEDAVG, validation=1.0),
    ]
    found = standings(trials, [0])
    assert found.local == "local-adamw"
    told = row(found, "fedavg").against_local
    assert told is not None
    assert told.other == "local-adamw"
    assert row(found, "local-adamw").against_local is None


def verdict(
    mine: Sequence[Sequence[float] | None],
    other: Sequence[Sequence[float] | None],
    n_clients: int = 6,
) -> str:
    """Return what is said of ``fedavg`` against ``local``, one list of losses a seed."""
    trials = []
    for label, by_seed in (("fedavg", mine), ("local", other)):
        for seed, losses in enumerate(by_seed):
            kept = None if losses is None else losses[:n_clients]
            more = {} if kept is None else {"clients": CLIENTS[:n_clients]}
            trials.append(trial(label, kept, seed=seed, **more))
    told = row(standings(trials, range(len(mine))), "fedavg").against_local
    assert told is not None
    return told.verdict


MIXED = [1.8, 3.0, 1.8, 3.0, 1.8, 3.0]  # better on average, and not for all


@pytest.mark.parametrize(
    ("mine", "other", "n_clients", "said"),
    [
        ([FEDAVG] * 3, [LOCAL] * 3, 6, "better"),
        ([LOCAL] * 3, [FEDAVG] * 3, 6, "worse"),
        ([MIXED] * 3, [LOCAL] * 3, 6, "no difference shown"),
        ([LOCAL] * 3, [LOCAL] * 3, 6, "no difference shown"),
        ([FEDAVG], [LOCAL], 6, "better (one seed)"),
        ([MIXED], [LOCAL], 6, "no difference shown (one seed)"),
        ([FEDAVG] * 3, [LOCAL] * 3, 5, "too few clients to say (5 of 6)"),
        ([FEDAVG, FEDAVG, None], [LOCAL] * 3, 6, "diverged with 1 of 3 seeds"),
        ([FEDAVG] * 3, [LOCAL, None, LOCAL], 6, "local diverged with 1 of 3 seeds"),
    ],
)
def test_no_more_is_said_than_the_interval_holds(
    mine: list[list[float] | None], other: list[list[float] | None], n_clients: int, said: str
) -> None:
    assert verdict(mine, other, n_clients) == said


def test_a_difference_is_paired_over_clients_and_seeds() -> None:
    trials = [
        *(trial("fedavg", FEDAVG, seed=seed) for seed in (0, 1)),
        *(trial("local", losses, seed=seed) for seed, losses in enumerate((LOCAL, MIXED))),
    ]
    told = row(standings(trials, [0, 1]), "fedavg").against_local
    assert told is not None
    table = np.array([FEDAVG, FEDAVG]) - np.array([LOCAL, MIXED])
    assert told.interval == paired_interval(table)
    assert told.interval.estimate == pytest.approx(table.mean())
    assert (told.n_seeds, told.n_clients) == (2, 6)


def test_seeds_that_one_of_the_two_has_not_run_yet_are_left_out() -> None:
    trials = [
        *(trial("fedavg", FEDAVG, seed=seed) for seed in (0, 1)),
        trial("local", LOCAL, seed=0),
        trial("local", seed=1, state="begun"),
    ]
    found = standings(trials, [0, 1])
    told = row(found, "fedavg").against_local
    assert told is not None
    assert (told.n_seeds, told.verdict) == (1, "better (one seed)")
    assert found.wins["fedavg", "local"] == 1.0
    assert row(found, "local").failed == 0
    assert row(found, "fedavg").harmed_by_local == (0,)


def test_a_seed_that_diverged_is_lost_in_every_pair() -> None:
    trials = [
        *(trial("fedavg", FEDAVG, seed=seed) for seed in (0, 1)),
        *(trial("local", losses, seed=seed) for seed, losses in enumerate((MIXED, None))),
    ]
    found = standings(trials, [0, 1])
    assert found.wins["fedavg", "local"] == (3 + 6) / 12  # b, d, f; and all of seed 1
    assert found.wins["local", "fedavg"] == 3 / 12
    assert row(found, "local").failed == 1
    assert len(row(found, "local").spreads) == 1
    assert row(found, "fedavg").against_best is not None


def test_who_diverged_somewhere_is_not_the_best_other() -> None:
    trials = [
        trial("fedavg", LOCAL, validation=2.5),
        trial("fedavg", LOCAL, validation=2.5, seed=1),
        trial("ditto", FEDAVG, validation=2.0),
        trial("ditto", seed=1),
        *(trial("local", LOCAL, validation=3.0, seed=seed) for seed in (0, 1)),
    ]
    told = row(standings(trials, [0, 1]), "local").against_best
    assert told is not None
    assert told.other == "fedavg"


def test_a_method_that_diverged_at_every_rate_is_there() -> None:
    trials = [
        trial("fedavg", rate=1.0),
        trial("fedavg", rate=2.0),
        *(trial("local", LOCAL, seed=seed) for seed in (0, 1)),
    ]
    found = standings(trials, [0, 1])
    gone = row(found, "fedavg")
    assert (gone.rate, gone.failed, gone.spreads) == (None, 1, ())
    assert math.isnan(gone.validation)
    assert gone.against_best is not None
    assert gone.against_best.verdict == "diverged with 1 of 1 seeds"
    assert found.wins["local", "fedavg"] == 1.0


def test_before_anything_has_run_there_is_nothing_to_say() -> None:
    found = standings([trial("fedavg", state="missing"), trial("local", state="begun")], [0, 1])
    assert (found.base, found.clients, found.local) == (None, (), None)
    assert [each.validation for each in found.methods] == [pytest.approx(math.nan, nan_ok=True)] * 2
    assert all(each.against_best is None for each in found.methods)


def test_means_over_seeds() -> None:
    assert over_seeds([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(1.5275, abs=1e-4))
    assert over_seeds([1.0])[0] == 1.0
    assert math.isnan(over_seeds([1.0])[1])
    assert math.isnan(over_seeds([])[0])

"""A comparison in words: every number and every word of the tables."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from pfl_lm.evaluate.standings import Standings, standings
from pfl_lm.evaluate.trials import Trial
from pfl_lm.report.standings_csv import COLUMNS, standings_csv
from pfl_lm.report.standings_table import standings_tables
from pfl_lm.report.standings_text import doubts, loss, signed, used_rate, with_spread
from tests.trials import ABOUT, CLIENTS, trial

FEDAVG = [2.0, 2.1, 2.2, 2.3, 2.4, 2.5]
LOCAL = [2.5, 2.5, 2.5, 2.6, 2.6, 2.6]


def world() -> list[Trial]:
    """Two seeds, two rates; with the second seed fedavg-sgd diverges, and ditto takes twice."""
    found: list[Trial] = []
    for seed in (0, 1):
        up = 0.1 * seed
        for rate in (0.1, 0.2) if seed == 0 else (0.1,):
            worse = 2.5 if rate == 0.2 else 2.0
            more: dict[str, Any] = {"seed": seed, "rate": rate}
            found.append(trial("ditto", [x + up for x in FEDAVG], validation=worse, **more))
            found.append(trial("local", LOCAL, validation=worse + 0.5, **more))
        gone = None if seed else FEDAVG
        found.append(trial("fedavg-sgd", gone, seed=seed, rate=0.1))
    twice = [
        replace(t, outcome=replace(t.outcome, steps=144, faults=1))
        if t.label == "ditto" and t.outcome is not None
        else t
        for t in found
    ]
    return sorted(twice, key=lambda each: each.label)


def shown(found: Standings, width: int = 110) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(standings_tables(found))
    assert isinstance(console.file, io.StringIO)
    return [line.strip() for line in console.file.getvalue().splitlines() if line.strip(" ─")]


def test_the_tables_word_for_word() -> None:
    assert shown(standings(world(), [0, 1]), width=110) == [
        "test loss of the clients' own models, nats a supervised token: lower is better; 6 clients,"
        " 2 seeds, ± standard",
        "deviation over seeds",
        "method      rate            mean  by rows  worst  tenth    std",
        "base           –   4.000 ± 0.000    4.000  4.000  4.000  0.000",
        "ditto        0.1   2.300 ± 0.071    2.383  2.550  2.500  0.171",
        "fedavg-sgd   0.1  2.250 [1 of 2]    2.333  2.500  2.450  0.171",
        "local        0.1   2.550 ± 0.000    2.571  2.600  2.600  0.050",
        "who was harmed, and what choosing models on validation did",
        "method      validation       unchosen  harmed  vs local",
        "ditto            2.000  2.800 ± 0.071  0 of 6    0 of 6",
        "fedavg-sgd       2.250          2.750  0 of 6    0 of 6",
        "local            2.500  3.050 ± 0.000  0 of 6",
        "against local training; 95 % bootstrap interval over clients and seeds, each by itself",
        "method                    minus local  so it is",
        "ditto       −0.250 (−0.417 to −0.083)  better",
        "fedavg-sgd  −0.300 (−0.450 to −0.167)  diverged with 1 of 2 seeds",
        "local                                  local training itself",
        "against the best other method by validation; 95 % bootstrap interval over clients and "
        "seeds, each by itself",
        "method      other                minus other  so it is",
        "ditto       local  −0.250 (−0.417 to −0.083)  better",
        "fedavg-sgd  ditto     0.000 (0.000 to 0.000)  diverged with 1 of 2 seeds",
        "local       ditto  +0.250 (+0.083 to +0.417)  worse",
        "what a run took",
        "method      optimizer     steps  MB up  seconds  runs",
        "ditto       adamw      144 (2×)    1.0       60  2 of 2, 2 turns failed",
        "fedavg-sgd  sgd              72    1.0       60  1 of 2, 1 diverged",
        "local       adamw            72    1.0       60  2 of 2",
        "! ditto: 0.1 is the lowest rate tried: a lower one may be better",
        "! fedavg-sgd: 0.1 is one rate only, not tuned",
        "! local: 0.1 is the lowest rate tried: a lower one may be better",
    ]


def test_on_a_narrow_terminal_no_number_is_cut() -> None:
    lines = shown(standings(world(), [0, 1]), width=80)
    assert not [line for line in lines if "…" in line]
    assert "ditto       −0.250 (−0.417 to −0.083)  better" in lines


def test_before_anything_is_finished_there_is_a_table_without_numbers() -> None:
    told = shown(standings([trial("fedavg", state="begun"), trial("local")], [0]))
    assert "fedavg     –     –        –      –      –    –" in told
    assert "local   adamw          –      –        –  0 of 1, 1 diverged" in told


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (-0.0001, "0.000"), (-0.25, "−0.250"), (0.25, "+0.250"), (float("nan"), "–")],
)
def test_signs(value: float, text: str) -> None:
    assert signed(value) == text


def test_losses_and_their_spread() -> None:
    assert (loss(2.0004), loss(float("nan"))) == ("2.000", "–")
    assert with_spread([]) == "–"
    assert with_spread([1.0]) == "1.000"
    assert with_spread([1.0, 2.0]) == "1.500 ± 0.707"


def test_a_rate_that_was_found_is_told() -> None:
    found = standings([trial("pflalign", FEDAVG, rate="auto")], [0])
    [row] = found.methods
    assert used_rate(row) == "auto: 0.1"


def test_doubts() -> None:
    other = {**ABOUT, "device": "cuda:0"}
    found = standings(
        [
            trial("fedavg", FEDAVG, splits=("validation",)),
            trial("local", LOCAL, about=other, splits=("validation",)),
        ],
        [0],
    )
    assert list(doubts(found)) == [
        "fedavg: 0.1 is one rate only, not tuned",
        "local: 0.1 is one rate only, not tuned",
        "one seed: what another one would have given is not known",
        "runs on cpu, cuda:0: last digits differ between devices",
        "no client has test rows: losses are of the rows that models and rates were chosen on",
    ]


# --- compare.csv ------------------------------------------------------------------------------


def test_the_csv_has_every_trial_client_split_and_candidate() -> None:
    trials = [*world(), trial("fedavg-sgd", seed=0, rate=9.0, reason='a, "b"\nc')]
    text = standings_csv(trials, standings(trials, [0, 1]).grids)
    found = list(csv.DictReader(io.StringIO(text)))
    assert tuple(found[0]) == COLUMNS
    finished = [each for each in trials if each.outcome is not None]
    assert len(found) == len(finished) * 6 * 2 * 3 + 2
    row = next(
        each
        for each in found
        if each["cell"] == "ditto-s1-r0.1"
        and (each["client"], each["split"], each["candidate"]) == ("b", "test", "local")
    )
    assert float(row["nll"]) == pytest.approx(2.2)
    facts = ("label", "method", "optimizer", "seed", "rate", "learning_rate", "rate_chosen")
    assert [row[key] for key in facts] == ["ditto", "ditto", "adamw", "1", "0.1", "0.1", "true"]
    assert (row["own"], row["chosen"], row["rows"], row["tokens"]) == ("false", "true", "2", "20")
    assert (row["steps"], row["failed_turns"], row["device"]) == ("144", "1", "cpu")
    assert row["digest"] == "0123456789abcdef" * 4
    gone = [each for each in found if each["state"] == "failed"]
    assert [(each["client"], each["nll"], each["reason"]) for each in gone] == [
        ("", "", "training has diverged"),
        ("", "", 'a, "b"\nc'),
    ]
    assert {each["client"] for each in found} == {"", *CLIENTS}

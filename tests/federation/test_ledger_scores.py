"""Scores, choices and costs in the ledger: as they were, to the bit, and in order."""

from __future__ import annotations

import math

from pfl_lm.evaluate import Choice
from pfl_lm.federation.history import Costs
from pfl_lm.federation.ledger import Ledger
from pfl_lm.federation.messages import Fault, Score
from tests.federation.entries import rows, score, scored, turn


def test_scores_come_in_order_and_to_the_bit(ledger: Ledger) -> None:
    ledger.commit_scores(scored(10, "a", score("realigned", 0.1 + 0.2)))
    ledger.commit_scores(scored(2, "b", score("local"), Score("test", "base", math.inf, 2, 5)))
    ledger.commit_scores(scored(2, "a", score("local"), score("base")))
    assert list(ledger.scores()) == [
        (2, "a", "validation", "base", 1.25),
        (2, "a", "validation", "local", 1.25),
        (2, "b", "test", "base", math.inf),
        (2, "b", "validation", "local", 1.25),
        (10, "a", "validation", "realigned", 0.1 + 0.2),
    ]
    assert rows(ledger, "SELECT rows, tokens FROM scores WHERE split = 'test'") == [(2, 5)]


def test_scores_and_summaries_are_read_row_by_row(ledger: Ledger) -> None:
    for client in ("a", "b"):
        turn(ledger, client, 1)
        ledger.commit_scores(scored(1, client, score("local")))
    assert next(ledger.scores())[1] == next(ledger.summaries())[0] == "a"
    assert next(ledger.turn_summaries())[1:] == ("a", {"loss_first": 1.0, "loss_last": 0.5})


def test_final_scores_are_those_of_the_round_of_the_choice(ledger: Ledger) -> None:
    choice = Choice("local", "why", -0.1, 0.1)
    ledger.commit_scores(scored(1, "b", score("global", 9.0)))
    ledger.commit_scores(scored(1, "a", score("global", 9.0)))  # never chosen for
    final = scored(2, "b", score("local", 0.5), score("base", 2.0), choice=choice)
    ledger.commit_scores(final)
    one = final.scores[0]
    assert ledger.final_scores() == [
        ("b", "validation", "base", 2.0, one.rows, one.tokens),
        ("b", "validation", "local", 0.5, one.rows, one.tokens),
    ]


def test_a_curve_is_of_the_methods_own_candidate(ledger: Ledger) -> None:
    """Where a round has scored one candidate, of that; where several, of the one that is asked."""
    choice = Choice("local", "why", -0.1, 0.1)
    for client, nll in (("a", 1.0), ("b", 4.0)):
        ledger.commit_scores(scored(0, client, score("base", 2 * nll)))
        ledger.commit_scores(scored(1, client, score("global", nll)))
        several = (score("local", 0.0), score("global", nll / 2), score("base", 9.0))
        ledger.commit_scores(scored(2, client, *several, choice=choice))
    assert ledger.validation_means("global") == [(0, 5.0), (1, 2.5), (2, 1.25)]


def test_costs_are_summed_over_turns(ledger: Ledger) -> None:
    assert ledger.costs() == Costs(0, 0, 0, 0.0, 0)
    turn(ledger, "a", 1)
    turn(ledger, "b", 2)
    ledger.commit_cohort(1, ["a"])
    ledger.commit_fault(1, "a", Fault("raised", "a bug"))
    expected = Costs(steps=8, bytes_down=80, bytes_up=2 * 13 * 4, seconds=3.0, faults=1)
    assert ledger.costs() == expected


def test_choices_come_back_as_they_were_in_id_order(ledger: Ledger) -> None:
    first, second = Choice("local", "why", -0.1, math.inf), Choice("base", "why not", 0.0, 0.0)
    ledger.commit_scores(scored(2, "b", choice=first))
    ledger.commit_scores(scored(3, "a", choice=second))
    assert list(ledger.choices().items()) == [("a", second), ("b", first)]
    assert (ledger.chosen(2), ledger.chosen(3)) == ({"b"}, {"a"})
    ledger.commit_scores(scored(3, "b", choice=second))  # a run that was extended
    assert (ledger.chosen(2), ledger.chosen(3)) == (set(), {"a", "b"})

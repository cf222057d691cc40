"""Which model a client takes home, as a table of cases."""

from __future__ import annotations

import math

import pytest

from pfl_lm.evaluate import BASE, Choice, RowScores, choose

NAN = math.nan


def rows(*nats: float) -> RowScores:
    """Scores of rows of one token each, so that numbers here are nats a token."""
    return RowScores(nats, (1,) * len(nats))


def model(mean: float, spread: float = 0.0, n: int = 4) -> RowScores:
    """A model whose rows lie ``spread`` above and below its mean, in turn."""
    return rows(*(mean + (spread if i % 2 else -spread) for i in range(n)))


# Against a model without spread, the paired error of `model(_, 0.3)` is
# sqrt(4/3 · 4 · 0.09) / 4 = 0.1732.
CASES = {
    "the method's own stands if nothing is better": (
        {"realigned": model(2.0), "local": model(2.1), "global": model(2.2), BASE: model(3.0)},
        ("realigned", "the method's own model, realigned", -1.0, 0.0),
    ),
    "a better one within one error does not replace it": (
        {"realigned": model(2.0), "local": model(1.83, 0.3), BASE: model(3.0)},
        ("realigned", "the method's own model, realigned", -1.0, 0.0),
    ),
    "a better one by more than one error does": (
        {"realigned": model(2.0), "local": model(1.82, 0.3), BASE: model(3.0)},
        ("local", "better than realigned by 0.1800 ± 0.1732 nats a token", -1.18, 0.1732),
    ),
    "of two that are better the best, whichever comes first": (
        {"realigned": model(2.0), "local": model(1.5), "global": model(1.6), BASE: model(3.0)},
        ("local", "better than realigned by 0.5000 ± 0.0000 nats a token", -1.5, 0.0),
    ),
    "of two that are better the best, whichever comes last": (
        {"realigned": model(2.0), "local": model(1.6), "global": model(1.5), BASE: model(3.0)},
        ("global", "better than realigned by 0.5000 ± 0.0000 nats a token", -1.5, 0.0),
    ),
    "the best within its error gives way to one that is sure": (
        {"realigned": model(2.0), "local": model(1.5, 1.0), "global": model(1.9), BASE: model(3)},
        ("global", "better than realigned by 0.1000 ± 0.0000 nats a token", -1.1, 0.0),
    ),
    "the backbone stands where nothing beats it": (
        {"realigned": model(2.5), "local": model(2.6), BASE: model(2.0)},
        (
            BASE,
            "no candidate beat the untouched backbone (realigned: +0.5000 ± 0.0000 nats a token)",
            0,
            0,
        ),
    ),
    "the backbone stands at a tie": (
        {"global": model(2.0), BASE: model(2.0)},
        (
            BASE,
            "no candidate beat the untouched backbone (global: +0.0000 ± 0.0000 nats a token)",
            0,
            0,
        ),
    ),
    "any margin beats the backbone": (
        {"global": model(1.999, 0.3), BASE: model(2.0)},
        ("global", "the method's own model, global", -0.001, 0.1732),
    ),
    "a candidate that is better than the own one may still lose to the backbone": (
        {"realigned": model(3.0), "local": model(2.5), BASE: model(2.0)},
        (
            BASE,
            "no candidate beat the untouched backbone (local: +0.5000 ± 0.0000 nats a token)",
            0,
            0,
        ),
    ),
    "the backbone is no rival of the own model before the last step": (
        {"realigned": model(2.0), "local": model(1.9), BASE: model(1.95)},
        ("local", "better than realigned by 0.1000 ± 0.0000 nats a token", -0.05, 0.0),
    ),
    "a candidate without a finite score is never chosen": (
        {"realigned": model(2.0), "local": model(NAN), "global": model(2.2), BASE: model(3.0)},
        ("realigned", "the method's own model, realigned", -1.0, 0.0),
    ),
    "one row alone never replaces the method's own": (
        {"realigned": rows(2.0), "local": rows(1.0), BASE: rows(3.0)},
        ("realigned", "the method's own model, realigned", -1.0, math.inf),
    ),
    "one row alone may beat the backbone": (
        {"local": rows(1.9), BASE: rows(2.0)},
        ("local", "the method's own model, local", -0.1, math.inf),
    ),
    "a model that overflows loses to the backbone": (
        {"local": rows(math.inf, 1.0), BASE: rows(2.0, 2.0)},
        (BASE, "no candidate beat the untouched backbone (local: +inf nats a token)", 0, 0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_choice(case: str) -> None:
    validation, (candidate, reason, margin, error) = CASES[case]

    choice = choose(validation, default=next(iter(validation)))

    assert (choice.candidate, choice.reason) == (candidate, reason)
    assert choice.margin == pytest.approx(margin, abs=1e-9)
    assert choice.standard_error == pytest.approx(error, abs=1e-4)


def test_the_default_is_named_and_not_the_first() -> None:
    validation = {"local": model(2.0), "global": model(2.0), BASE: model(3.0)}
    assert choose(validation, default="global") == Choice(
        "global", "the method's own model, global", -1.0, 0.0
    )


@pytest.mark.parametrize("broken", ["local", BASE])
def test_without_a_finite_score_there_is_no_choice(broken: str) -> None:
    validation = {"local": model(2.0), BASE: model(3.0), broken: model(NAN)}
    with pytest.raises(ValueError, match="candidate 'local' has no finite validation score"):
        choose(validation, default="local")

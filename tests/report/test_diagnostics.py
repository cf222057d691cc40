"""Many rounds and many layers: which are shown, and that the reader hears of the rest."""

from __future__ import annotations

from rich.console import Console, Group

from pfl_lm.report.diagnostics import Told, means
from pfl_lm.report.diagnostics_table import MOST_LAYERS, MOST_ROUNDS, layer_table, round_table


def shown(table: Group) -> list[str]:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table)
    return [" ".join(line.split()) for line in captured.get().splitlines() if line.strip()]


def layers(n: int, quantity: str = "gamma_mean") -> list[Told]:
    """Return a round of ``n`` layers, of which those in the middle have the highest numbers."""
    return [
        Told(1, "a", layer, quantity, 0.0 if layer in ("all", "rest") else 1 / (1 + abs(i - n / 2)))
        for i, layer in enumerate(["all", *map(str, range(n)), "rest"])
    ]


def test_means_are_over_the_clients_that_have_the_number() -> None:
    found = [
        Told(1, "a", "all", "drift", 1.0),
        Told(1, "b", "all", "drift", 4.0),
        Told(1, "b", "all", "cosine", 0.5),
        Told(2, "a", "all", "drift", 7.0),
        Told(2, "a", "3", "drift", 8.0),
    ]
    assert means(found) == {
        (1, "all"): {"drift": 2.5, "cosine": 0.5},
        (2, "all"): {"drift": 7.0},
        (2, "3"): {"drift": 8.0},
    }
    lines = shown(round_table(found))
    assert lines[0] == "the whole adapter, round by round: means over the clients"
    assert lines[1] == "round clients cos drift"
    assert lines[3:] == ["1 2 0.5 2.5", "2 1 7"]


def test_of_many_rounds_the_first_and_the_last_are_shown() -> None:
    found = [Told(r, "a", "all", "drift", float(r)) for r in range(1, 101)]
    lines = shown(round_table(found))
    assert lines[0].endswith(f"; {100 - MOST_ROUNDS} more rounds in diagnostics.csv")
    rounds = [int(line.split()[0]) for line in lines[3:]]
    assert rounds == [1, 2, 3, 4, 5, *range(86, 101)]
    few = shown(round_table(found[:MOST_ROUNDS]))
    assert "more" not in few[0]
    assert len(few) == 3 + MOST_ROUNDS


def test_of_many_layers_the_first_the_last_and_the_worst_are_shown() -> None:
    lines = shown(layer_table(layers(30), 1))
    assert lines[0] == (
        "round 1, layer by layer: means over the clients (* highest γ); "
        f"{31 - MOST_LAYERS} more layers in diagnostics.csv"
    )
    names = [line.rsplit(" ", 1)[0] for line in lines[3:]]
    worst = ("12 *", "13 *", "14 *", "15 *")  # 14 is highest, and 16 no higher than 12
    assert names == ["0", "1", "2", "3", *worst, "27", "28", "29", "rest"]


def test_without_gamma_the_worst_are_those_that_drift() -> None:
    lines = shown(layer_table(layers(30, "drift"), 1))
    assert "(* highest drift)" in lines[0]


def test_few_layers_are_all_shown_and_none_is_marked() -> None:
    lines = shown(layer_table(layers(MOST_LAYERS - 1), 1))
    assert lines[0] == "round 1, layer by layer: means over the clients"
    assert len(lines) == 3 + MOST_LAYERS
    assert "*" not in "".join(lines)


def test_sums_beyond_floats_are_shown_as_they_are() -> None:
    found = [Told(1, client, "all", "drift", 1.7e308) for client in "abc"]
    assert shown(round_table(found))[-1] == "1 3 inf"

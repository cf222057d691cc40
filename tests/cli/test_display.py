"""What a person sees of a run: plain lines in a pipe, one live line at a terminal, the table."""

from __future__ import annotations

import math
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import pfl_lm.cli.display as display
from pfl_lm.cli.display import Display, Estimate, duration
from pfl_lm.evaluate import Choice
from pfl_lm.export.adapters import ClientResult
from pfl_lm.federation.messages import Update
from pfl_lm.federation.watch import RoundReport, Workload
from pfl_lm.report.table import client_table, summary_lines, worst_client

ESCAPE = "\x1b"
MARKUP = ("[red]x", "[/red]", "[link=https://a.b]c", ":smile:", "{task.id}", "[bold")


class Clock:
    """A clock that goes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(display.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(display, "_A_STEP_IN_ROWS", 3.0)  # a measured number, and no rule
    return Clock(monkeypatch)


def report(round: int, client: str = "bob", train: float | None = 2.5) -> RoundReport:
    return RoundReport(
        round=round,
        cohort=2,
        candidate="realigned",
        train_loss=train,
        mean=3.0,
        worst=3.25,
        worst_client=client,
        bytes_up=2_500_000 if train else 0,
        seconds=61.0,
    )


def follow(console: Console, clock: Clock, client: str = "bob") -> None:
    """A run of two rounds, as its watch is told of it."""
    with Display(console, rows_in_step=4) as watch:
        watch.note(f"loading for {client}")
        watch.begin(Workload(rounds=2, clients=3, steps=4, rows=30))
        clock.now += 10
        watch.rows(10)
        watch.round(report(0, client, train=None))
        for _ in range(2):
            clock.now += 20
            watch.step()
        watch.turn(Update(run="tiny", round=1, client=client))
        watch.round(report(1, client))


# --- lines ------------------------------------------------------------------------------------


def test_a_pipe_gets_plain_lines_and_no_more(clock: Clock) -> None:
    console = Console(file=StringIO(), width=20)
    follow(console, clock)
    assert console.file.getvalue() == (  # type: ignore[attr-defined]
        "loading for bob\n"
        "3 clients, 2 rounds: 4 optimizer steps, 30 rows to score\n"
        "round 0/2 · validation (realigned) mean 3.000 · worst 3.250 bob · 1 min 01 s"
        " · 1 min 08 s left\n"
        "round 1/2 · 2 clients · train 2.500 · validation (realigned) mean 3.000"
        " · worst 3.250 bob · 2.5 MB up · 1 min 01 s · 1 min 00 s left\n"
    )


def test_a_terminal_gets_the_same_lines_and_a_live_one(clock: Clock) -> None:
    console = Console(file=StringIO(), width=200, force_terminal=True, legacy_windows=False)
    follow(console, clock)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert ESCAPE in shown
    assert "round 1/2 · 2 clients · train 2.500" in shown
    assert "round 1/2  bob" in shown
    assert "about 1 min 00 s left" in shown


@pytest.mark.parametrize("client", MARKUP)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_clients_name_is_text_and_never_markup(clock: Clock, client: str, terminal: bool) -> None:
    console = Console(file=StringIO(), width=200, force_terminal=terminal, legacy_windows=False)
    follow(console, clock, client)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"loading for {client}\n" in shown
    assert f"worst 3.250 {client} · 1 min" in shown
    assert (f"round 1/2  {client} " in shown) == terminal


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((0, "0 s"), (0.4, "0 s"), (42.3, "42 s"), (59.4, "59 s"), (59.6, "1 min 00 s")),
        *((185, "3 min 05 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min")),
        *((7800, "2 h 10 min"), (360_000, "100 h 00 min")),
    ],
)
def test_durations_are_said_as_a_person_would(seconds: float, said: str) -> None:
    assert duration(seconds) == said


# --- the estimate -----------------------------------------------------------------------------


def test_nothing_is_estimated_before_anything_was_measured(clock: Clock) -> None:
    estimate = Estimate(Workload(rounds=1, clients=1, steps=5, rows=5), rows_in_step=4)
    assert estimate.seconds_left is None
    assert estimate.share == 0.0


def test_an_unmeasured_kind_is_priced_by_the_other(clock: Clock) -> None:
    """A step on 4 rows costs as much as scoring 3 · 4 rows, until both were seen."""
    by_rows = Estimate(Workload(rounds=1, clients=1, steps=10, rows=8), rows_in_step=4)
    clock.now += 6
    by_rows.did("rows", 2)  # 3 s a row, so 36 s a step
    assert by_rows.seconds_left == pytest.approx(6 * 3 + 10 * 36)

    by_steps = Estimate(Workload(rounds=1, clients=1, steps=10, rows=8), rows_in_step=4)
    clock.now += 48
    by_steps.did("steps", 2)  # 24 s a step, so 2 s a row
    assert by_steps.seconds_left == pytest.approx(8 * 24 + 8 * 2)


def test_each_kind_costs_what_it_has_cost_so_far(clock: Clock) -> None:
    estimate = Estimate(Workload(rounds=1, clients=1, steps=10, rows=20), rows_in_step=4)
    for kind, n, seconds in (("rows", 5, 10), ("steps", 1, 7), ("steps", 1, 9), ("rows", 5, 20)):
        clock.now += seconds
        estimate.did(kind, n)
    # 3 s a row and 8 s a step so far; 10 rows and 8 steps are left.
    assert estimate.seconds_left == pytest.approx(10 * 3 + 8 * 8)
    assert estimate.share == pytest.approx(46 / (46 + 94))
    clock.now += 1000
    assert estimate.seconds_left == pytest.approx(94)  # waiting is nobody's work until it is done


def test_at_the_end_nothing_is_left(clock: Clock) -> None:
    estimate = Estimate(Workload(rounds=1, clients=1, steps=1, rows=2), rows_in_step=1)
    clock.now += 3
    estimate.did("steps", 1)
    estimate.did("rows", 5)  # more than was foreseen
    assert estimate.left == {"steps": 0, "rows": 0}
    assert estimate.seconds_left == 0
    assert estimate.share == 1.0


# --- the table --------------------------------------------------------------------------------


def client(name: str, candidate: str, /, *, test: bool = True, **nll: float) -> ClientResult:
    scores = {"validation": dict.fromkeys(nll, 9.0)} | ({"test": nll} if test else {})
    return ClientResult(name, "s", Choice(candidate, "why", 0.0, 0.0), scores, "0")


FOUR = [
    client("anna", "realigned", base=3.0, realigned=2.75, local=2.9, **{"global": 2.8}),
    client("ben", "local", base=2.0, realigned=1.5, local=2.125, **{"global": 2.5}),
    client("cleo", "base", base=4.0, realigned=4.5, local=4.25, **{"global": 5.0}),
    client("dora", "realigned", test=False, base=1.0, realigned=1.0, local=1.0, **{"global": 1.0}),
]


def lines_of(results: list[ClientResult], width: int = 80) -> list[str]:
    """Return the table's lines, each run of spaces as one; fail if one is wider than the screen."""
    console = Console(width=width, file=StringIO())
    console.print(client_table(results))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ESCAPE not in text
    assert all(len(line) <= width for line in text.splitlines())
    return [" ".join(line.split()) for line in text.splitlines() if line.strip(" ─")]


def test_the_table_says_who_was_helped_and_who_was_not() -> None:
    assert lines_of(FOUR) == [
        "test loss, nats a supervised token (lower is better)",
        "client base global realigned local its model vs base",
        "anna 3.000 2.800 2.750 2.900 realigned -0.250 helped",
        "ben 2.000 2.500 1.500 2.125 local +0.125 hurt",
        "cleo 4.000 5.000 4.500 4.250 base +0.000 not helped",
        "dora realigned no rows",
        "mean 3.000 3.433 2.917 3.092 -0.042",
    ]


def test_of_many_clients_the_table_lists_the_worst_off_and_names_the_file_with_the_rest() -> None:
    losses = [(37 * i % 10_000) / 1000 for i in range(10_000)]
    results = [client(f"c{i}", "local", base=5.0, local=loss) for i, loss in enumerate(losses)]
    title, told, head, *listed, mean = lines_of(results)
    assert title == "test loss, nats a supervised token (lower is better)"
    assert told == "the 20 of 10000 clients that are worst off; metrics.csv has all"
    assert head.startswith("client base local")
    worst = [losses.index(k / 1000) for k in range(9999, 9979, -1)]
    assert [line.split()[0] for line in listed] == [f"c{i}" for i in worst]
    assert mean == "mean 5.000 5.000 -0.001"


def test_as_many_clients_as_fit_are_listed_in_their_own_order() -> None:
    results = [client(f"c{i}", "local", base=5.0, local=float(i)) for i in range(20)]
    title, _, *listed, _ = lines_of(results)
    assert title.endswith("(lower is better)")
    assert [line.split()[0] for line in listed] == [f"c{i}" for i in range(20)]


def test_the_last_lines_count_and_say_what_to_do_next() -> None:
    assert summary_lines(FOUR, Path("/runs/tiny")) == [
        "1 of 3 clients helped, 1 hurt, 1 unchanged; worst off: cleo, 4.000",
        "/runs/tiny/adapters  one PEFT folder per client",
        "/runs/tiny/metrics.csv",
        "next: load anna's adapter with  "
        'PeftModel.from_pretrained(model, "/runs/tiny/adapters/s")',
        "      or see what a push to the Hub would send:  "
        "pfl-lm push /runs/tiny --repo ORG/NAME --dry-run",
    ]


def test_without_any_test_rows_the_table_is_about_validation() -> None:
    assert lines_of([client("anna", "local", test=False, base=2.0, local=2.0)]) == [
        "validation loss, nats a supervised token (lower is better)",
        "client base local its model vs base",
        "anna 9.000 9.000 local +0.000 unchanged",
        "mean 9.000 9.000 +0.000",
    ]


def test_what_acts_on_a_terminal_is_escaped_and_long_ids_are_cut(clock: Clock) -> None:
    console = Console(file=StringIO(), width=20)
    follow(console, clock, f"\u202e\x1b[2J{'x' * 10_000}")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\u202e" not in shown
    assert ESCAPE not in shown
    assert f" \\u202e\\x1b[2J{'x' * 114}… · " in shown


@pytest.mark.parametrize("name", MARKUP)
def test_names_in_the_table_are_text_and_never_markup(name: str) -> None:
    results = [client(name, "local", base=2.0, local=1.5)]
    rows = lines_of(results, width=120)
    assert rows[2] == f"{name} 2.000 1.500 local -0.500 helped"
    assert name in summary_lines(results, Path("/r"))[-2]


def test_a_long_name_is_folded_and_no_number_is_cut() -> None:
    name = "client-" + "x" * 100
    results = [client(name, "realigned", base=2, realigned=1, local=1, **{"global": 1})]
    header, first, *more = lines_of(results)[1:-1]
    assert header == "client base global realigned local its model vs base"
    start, *numbers = first.split()
    assert numbers[:6] == ["2.000", "1.000", "1.000", "1.000", "realigned", "-1.000"]
    assert start + "".join(line.split()[0] for line in more) == name


def test_the_worst_client_is_the_one_with_the_highest_loss_of_its_own_model() -> None:
    results = [
        client("anna", "local", base=9.0, local=1.0),
        client("ben", "local", base=2.0, local=1.5),
        client("cleo", "local", base=2.0, local=math.nextafter(1.5, 0)),
    ]
    assert worst_client(results).client == "ben"
    assert "worst off: ben, 1.500" in summary_lines(results, Path("/r"))[0]

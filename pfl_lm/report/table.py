"""The table at the end of a run: clients, every candidate, what was chosen, who was helped."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pfl_lm.evaluate import BASE
from pfl_lm.export.adapters import ClientResult
from pfl_lm.export.card_sections import CANDIDATES
from pfl_lm.privacy.spent import largest, said

MOST_CLIENTS = 20
"""How many clients have a line; of more, those that are worst off. `metrics.csv` has them all."""


def split_shown(results: Sequence[ClientResult]) -> str:
    """Return the split the table is about: test, unless no client has test rows."""
    return "test" if any("test" in result.scores for result in results) else "validation"


def client_table(results: Sequence[ClientResult]) -> Group:
    """Lay out final scores in nats a supervised token; the last column is against the backbone.

    Where rows have classes, one says how many of them its model tells, against the backbone.

    Of many clients the worst off have a line, worst first; the means are over all of them.
    """
    split = split_shown(results)
    candidates = _candidates(results)
    accuracies = [_accuracies(result, split) for result in results]
    classes = any(each is not None for each in accuracies)
    unit = "row" if classes else "supervised token"
    title = [f"{split} loss, nats a {unit} (lower is better)"]
    if classes:
        title[0] += f"; accuracy on {split} rows, the backbone's and its model's"
    listed = results
    if len(results) > MOST_CLIENTS:
        listed = sorted(results, key=lambda result: -_own_loss(result, split))[:MOST_CLIENTS]
        told = f"the {MOST_CLIENTS} of {len(results)} clients that are worst off"
        title.append(f"{told}; metrics.csv has all")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("client", overflow="fold")
    for candidate in candidates:
        table.add_column(candidate, justify="right", no_wrap=True)
    table.add_column("its model", no_wrap=True)
    table.add_column("vs base", justify="right", no_wrap=True)
    if classes:
        table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for result in listed:
        scores = result.scores.get(split, {})
        shown = [_number(scores.get(candidate)) for candidate in candidates]
        gain, verdict = _verdict(result, split)
        accurate = [_arrow(_accuracies(result, split))] if classes else []
        table.add_row(
            Text(result.client), *shown, result.choice.candidate, gain, *accurate, verdict
        )
    means = [_mean(results, split, candidate) for candidate in candidates]
    gains = _gains(results, split)
    mean_gain = f"{math.fsum(gains) / len(gains):+.3f}" if gains else ""
    table.add_section()
    accurate = [_arrow(_mean_of_pairs(accuracies))] if classes else []
    table.add_row(Text("mean"), *map(_number, means), "", mean_gain, *accurate, "")
    return Group(*map(Text, title), table)  # a table's own title would wrap at the table's width


def summary_lines(results: Sequence[ClientResult], folder: Path) -> list[str]:
    """Return what the table comes to, where everything is, and what to type next."""
    split = split_shown(results)
    gains = _gains(results, split)
    helped = sum(gain < 0 for gain in gains)
    hurt = sum(gain > 0 for gain in gains)
    same = len(gains) - helped - hurt
    worst = worst_client(results)
    loss = worst.scores.get(split, {}).get(worst.choice.candidate, math.nan)
    lines = [
        f"{helped} of {len(gains)} clients helped, {hurt} hurt, {same} unchanged; "
        f"worst off: {worst.client}, {loss:.3f}"
    ]
    lines += privacy_lines(results)
    lines += [f"{folder / 'adapters'}  one PEFT folder per client", f"{folder / 'metrics.csv'}"]
    example = results[0]
    load = f'PeftModel.from_pretrained(model, "{folder / "adapters" / example.slug}")'
    push = f"pfl-lm push {shlex.quote(str(folder))} --repo ORG/NAME --dry-run"
    lines += [f"next: load {example.client}'s adapter with  {load}"]
    return [*lines, f"      or see what a push to the Hub would send:  {push}"]


def privacy_lines(results: Sequence[ClientResult]) -> list[str]:
    """Return the largest ε of any client for each lever that was set, in one line or none."""
    most = largest({result.client: result.spent for result in results})
    levers = (("rows", most.record_level), ("clients", most.client_level))
    told = [f"{what}, {said(spent)}" for what, spent in levers if spent is not None]
    return [f"differential privacy, most of any client: {'; '.join(told)}"] if told else []


def worst_client(results: Sequence[ClientResult]) -> ClientResult:
    """Return the result of the client whose own model has the highest loss."""
    split = split_shown(results)
    return max(results, key=lambda result: _own_loss(result, split))


def _own_loss(result: ClientResult, split: str) -> float:
    return result.scores.get(split, {}).get(result.choice.candidate, -math.inf)


def gain_over_base(result: ClientResult, split: str) -> float | None:
    """Return own model minus backbone, nats a token: below zero is better. None if not scored."""
    scores = result.scores.get(split, {})
    if BASE not in scores:
        return None
    return scores[result.choice.candidate] - scores[BASE]


def _gains(results: Sequence[ClientResult], split: str) -> list[float]:
    gains = (gain_over_base(result, split) for result in results)
    return [gain for gain in gains if gain is not None]


def _accuracies(result: ClientResult, split: str) -> tuple[float, float] | None:
    """Return the accuracy of the backbone and of the client's own model; None if there is none."""
    metrics = result.metrics.get(split, {})
    found = [metrics.get(name, {}).get("accuracy") for name in (BASE, result.choice.candidate)]
    base, own = found
    return None if base is None or own is None else (base, own)


def _mean_of_pairs(pairs: Sequence[tuple[float, float] | None]) -> tuple[float, float]:
    base, own = zip(*(pair for pair in pairs if pair is not None), strict=True)
    return math.fsum(base) / len(base), math.fsum(own) / len(own)


def _arrow(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.3f} → {pair[1]:.3f}"


def _verdict(result: ClientResult, split: str) -> tuple[str, str]:
    gain = gain_over_base(result, split)
    if gain is None:
        return "", "no rows"
    if result.choice.candidate == BASE:
        return f"{gain:+.3f}", "not helped"
    return f"{gain:+.3f}", "helped" if gain < 0 else "hurt" if gain > 0 else "unchanged"


def _candidates(results: Sequence[ClientResult]) -> list[str]:
    found = {name for result in results for name in result.scores.get("validation", {})}
    return [name for name in CANDIDATES if name in found] + sorted(found.difference(CANDIDATES))


def _mean(results: Sequence[ClientResult], split: str, candidate: str) -> float | None:
    values = [r.scores[split][candidate] for r in results if candidate in r.scores.get(split, {})]
    return math.fsum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

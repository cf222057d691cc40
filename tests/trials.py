"""Trials of a comparison, made by hand for the tests of what is said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pfl_lm.evaluate.trials import ClientScore, Outcome, Trial

CLIENTS = tuple("abcdef")
ABOUT = {"device": "cpu", "pfl_lm": "0.1.0", "torch": "2.9.0", "python": "3.11.7"}


def outcome(
    chosen: Sequence[float],
    *,
    own: Sequence[float] | None = None,
    base: Sequence[float] | None = None,
    validation: float | None = None,
    clients: Sequence[str] = CLIENTS,
    rows: Sequence[int] = (1, 2, 3, 4, 5, 6),
    splits: Sequence[str] = ("validation", "test"),
    rate: float = 0.1,
) -> Outcome:
    """Return what a run came to: ``local`` is every client's model, ``global`` the method's own.

    ``validation`` is each client's validation loss, by default its test loss.
    """
    columns = {
        "local": chosen,
        "global": own or [loss + 0.5 for loss in chosen],
        "base": base or [4.0] * len(clients),
    }
    scores: dict[str, dict[str, dict[str, ClientScore]]] = {}
    for i, client in enumerate(clients):
        for split in splits:
            for candidate, losses in columns.items():
                held = split == "validation" and candidate == "local" and validation is not None
                loss = validation if held else losses[i]
                assert loss is not None
                score = ClientScore(loss, rows[i], 10 * rows[i])
                scores.setdefault(client, {}).setdefault(split, {})[candidate] = score
    return Outcome(
        own="global",
        chosen=dict.fromkeys(clients, "local"),
        scores=scores,
        curve=((0, 4.0), (1, 3.5), (2, 3.25)),
        steps=72,
        bytes_down=2_000_000,
        bytes_up=1_000_000,
        seconds=60.0,
        faults=0,
        learning_rate=rate,
    )


def trial(
    label: str,
    chosen: Sequence[float] | None = None,
    *,
    seed: int = 0,
    rate: float | str = 0.1,
    state: Any = None,
    reason: str = "",
    method: str | None = None,
    about: Mapping[str, str] = ABOUT,
    **more: Any,
) -> Trial:
    """Return one trial; it is finished if there are losses, else failed unless said otherwise."""
    made = None if chosen is None else outcome(chosen, **more)
    over = state or ("failed" if made is None else "finished")
    return Trial(
        name=f"{label}-s{seed}-r{rate}",
        label=label,
        method=method or label.split("-")[0],
        optimizer="sgd" if label.endswith("sgd") else "adamw",
        seed=seed,
        rate=rate,
        state=over,
        reason=reason or ("training has diverged" if over == "failed" else ""),
        about=about if over in ("finished", "failed") else {},
        digest="" if over == "missing" else "0123456789abcdef" * 4,
        outcome=made,
    )

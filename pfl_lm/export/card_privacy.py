"""What a card says of differential privacy: numbers, and what they do not cover. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from pfl_lm.privacy.spent import ClientSpent, Spent, said
from pfl_lm.recipe import ClientLevelOptions, PrivacyOptions, RecordLevelOptions


def privacy_lines(privacy: PrivacyOptions, spent: ClientSpent, *, shared: bool) -> Iterator[str]:
    """Yield a line for each lever that was set.

    Args:
        privacy: the levers.
        spent: of the client whose adapter it is; of a shared adapter, the most of any client.
        shared: whether it is the shared one.
    """
    if privacy.record_level is not None and spent.record_level is not None:
        yield _of_rows(privacy.record_level, spent.record_level, shared=shared)
    if privacy.client_level is not None and spent.client_level is not None:
        yield _of_clients(privacy.client_level, spent.client_level, shared=shared)


def _of_rows(lever: RecordLevelOptions, spent: Spent, *, shared: bool) -> str:
    whose = "a client's" if shared else "this client's"
    return (
        f"**One row among {whose} train rows is bounded by differential privacy: {said(spent)}**"
        f"{_most(shared)} (DP-SGD, noise multiplier {lever.noise_multiplier:g}, gradients of rows "
        f"clipped to {lever.max_grad_norm:g}; Rényi accounting over all turns). Several rows "
        "about one thing are not one row. Validation and test rows, the scores above and the "
        "choice by them are not covered."
    )


def _of_clients(lever: ClientLevelOptions, spent: Spent, *, shared: bool) -> str:
    share, limit = (
        "A client's share in this adapter",
        "The server, which added the noise, saw every upload without it; scores are not covered.",
    )
    if not shared:
        share, limit = (
            "This client's share in what others get, the shared adapter above all,",
            "That does not cover this adapter, which is the client's own, nor its scores; and the "
            "server, which added the noise, saw its uploads without it.",
        )
    return (
        f"**{share} is bounded by differential privacy: {said(spent)}**{_most(shared)} (noise "
        f"multiplier {lever.noise_multiplier:g}, changes clipped to {lever.clip_norm:g}; Rényi "
        f"accounting over all rounds). {limit}"
    )


def _most(shared: bool) -> str:
    return ", the most of any client" if shared else ""

"""A head that stays with its client, whatever the method: kept beside the method's own state.

    FedPer (Arivazhagan et al., arXiv 1912.00818): layers below are averaged, the head is not

The method's vectors hold at the head's place what the server sent, from the first to the last: the
zeros that everybody starts from. So uploads, offsets and averages have nothing of any head in
them. What the client has trained there is a vector of its own in the client's state.
"""

from __future__ import annotations

from pfl_lm.layout import Vector
from pfl_lm.methods import ClientState

NAME = "own_head"
"""What the vector is called in a client's state; no method calls one of its own so."""


def with_own_head(state: ClientState, head: Vector | None) -> ClientState:
    """Return a state as it is kept: the method's, and the head if it is private."""
    if head is None:
        return state
    return ClientState({**state.vectors, NAME: head}, state.scalars)


def apart(kept: ClientState) -> tuple[ClientState, Vector | None]:
    """Return the method's state, and the head that was kept beside it, if any."""
    vectors = {name: vector for name, vector in kept.vectors.items() if name != NAME}
    return ClientState(vectors, kept.scalars), kept.vectors.get(NAME)

"""Local-only training: every client for itself, the control that personalization must beat.

    w_i ← w_i - η ∇F_i(w_i)        T steps a round, nothing is uploaded

With AdamW its moments go on from round to round: R rounds of T steps are one loop of R·T steps.

State: w_i ``weights``, and AdamW's moments. Candidate: ``local``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pfl_lm.layout import Vector
from pfl_lm.methods.base import (
    Broadcast,
    ClientInfo,
    ClientState,
    LocalRun,
    Method,
    ServerState,
    Upload,
)
from pfl_lm.methods.moments import fresh_moments, kept_moments, with_moments


class Local(Method):
    """Train each client on its own data alone."""

    def init_client(self, info: ClientInfo, start: Vector) -> ClientState:
        """Start from the adapter that every client starts from."""
        moments = fresh_moments(self.setup.training, start)
        return with_moments({"weights": start.clone()}, moments)

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Go on from where the client's last turn ended; upload nothing."""
        moments = kept_moments(client)
        weights = run.train(client.vectors["weights"], steps=run.steps, moments=moments)
        return Upload({}, weight=0.0), with_moments({"weights": weights}, moments)

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Leave the server as it is."""
        return server

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the client's own weights."""
        return {"local": client.vectors["weights"]}

"""Local-only training: every client for itself, the control that personalization must beat.

    w_i ← w_i - η ∇F_i(w_i)        T steps a round, nothing is uploaded

With AdamW its moments go on from round to round: R rounds of T steps are one loop of R·T steps.

State: w_i ``weights``, and AdamW's moments. Candidate: ``local``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

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


class Local(Method):
    """Train each client on its own data alone."""

    def init_client(self, info: ClientInfo, start: Vector) -> ClientState:
        """Start from the adapter that every client starts from."""
        vectors = {"weights": start.clone()}
        if self.setup.training.optimizer == "adamw":
            vectors |= {"adamw_first": torch.zeros_like(start)}
            vectors |= {"adamw_second": torch.zeros_like(start)}
        return ClientState(vectors, {"adamw_step": 0.0})

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Go on from where the client's last turn ended; upload nothing."""
        from pfl_lm.train import Moments

        moments = None
        if "adamw_first" in client.vectors:
            moments = Moments(
                first=client.vectors["adamw_first"].clone(),
                second=client.vectors["adamw_second"].clone(),
                step=int(client.scalars["adamw_step"]),
            )
        weights = run.train(client.vectors["weights"], steps=run.steps, moments=moments)
        if moments is None:
            return Upload({}, weight=0.0), ClientState({"weights": weights}, dict(client.scalars))
        kept = {"weights": weights, "adamw_first": moments.first, "adamw_second": moments.second}
        return Upload({}, weight=0.0), ClientState(kept, {"adamw_step": float(moments.step)})

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Leave the server as it is."""
        return server

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the client's own weights."""
        return {"local": client.vectors["weights"]}

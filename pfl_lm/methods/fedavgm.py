"""FedAvgM: FedAvg whose server goes on in the direction of earlier rounds.

Hsu, Qi & Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", arXiv 1909.06335.

    client:  w_k ← w_g, then T steps on F_k
    server:  D ← Σ_k n_k w_k / Σ_k n_k - w_g                the averaged change
             u ← β u + D
             w_g ← w_g + η_s u

w_g ``global_weights``, u ``velocity``, β ``server_momentum``, η_s ``server_learning_rate``. This is
the heavy-ball form: u sums changes up, and a steady D makes steps of η_s D / (1 - β). The other
common form, u ← β u + (1 - β) D, is this one with η_s times 1 - β.

Where a robust rule takes the place of the mean, D is what it leads to, minus w_g. The server's sums
are in float64 and rounded once; β = 0 and η_s = 1 is FedAvg to that rounding.

State: w_k after its last turn, only to be scored. Upload: w_k. Candidates: ``global``, ``local``
(right after this client's own T steps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from pfl_lm.layout import Vector
from pfl_lm.methods.aggregate import upload_weight
from pfl_lm.methods.base import Broadcast, ClientState, LocalRun, Method, ServerState, Upload
from pfl_lm.methods.combine import combine

if TYPE_CHECKING:
    from pfl_lm.recipe import FedAvgMOptions


class FedAvgM(Method):
    """Average the clients' changes, and let the server's steps have momentum."""

    options: FedAvgMOptions

    def init_server(self, start: Vector) -> ServerState:
        """Start at rest."""
        return ServerState({"global_weights": start.clone(), "velocity": torch.zeros_like(start)})

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Train from the global weights and upload where that leads."""
        weights = run.train(sent.vectors["global_weights"], steps=run.steps)
        weight = upload_weight(self.options.weighting, run)
        return Upload({"weights": weights}, weight=weight), ClientState({"weights": weights})

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Take one step with momentum along the averaged change."""
        before = server.vectors["global_weights"]
        combined = combine(self.setup, round, before, uploads, "weights")
        change = combined.double() - before.double()
        velocity = self.options.server_momentum * server.vectors["velocity"].double() + change
        after = before.double() + self.options.server_learning_rate * velocity
        return ServerState({"global_weights": after.float(), "velocity": velocity.float()})

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the global weights, and the client's after its last local training."""
        return {"global": sent.vectors["global_weights"], "local": client.vectors["weights"]}

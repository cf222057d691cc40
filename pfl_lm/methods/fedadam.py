"""FedAdam: the averaged change of a round takes the gradient's place in an Adam on the server.

Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, Algorithm 2.

    client:  w_k ← w_g, then T steps on F_k
    server:  D ← Σ_k n_k w_k / Σ_k n_k - w_g                the averaged change
             m ← β₁ m + (1 - β₁) D                          m = 0 at first
             v ← β₂ v + (1 - β₂) D²                         v = τ² at first
             w_g ← w_g + η_s m / (√v + τ)

w_g ``global_weights``, m ``first_moment``, v ``second_moment``, η_s ``server_learning_rate``, β₁ β₂
``beta_1`` ``beta_2``, τ ``tau``. As in the paper v is of D and not of m, nothing is corrected for
its start, and τ is outside the root. The paper averages the changes alike (``weighting: uniform``).

Where a robust rule takes the place of the mean, D is what it leads to, minus w_g. The server's sums
are in float64 and rounded once.

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
    from pfl_lm.recipe import FedAdamOptions


class FedAdam(Method):
    """Average the clients' changes, and let the server step as Adam does."""

    options: FedAdamOptions

    def init_server(self, start: Vector) -> ServerState:
        """Start with m at zero and v at its floor τ²."""
        second = torch.full_like(start, self.options.tau**2)
        moments = {"first_moment": torch.zeros_like(start), "second_moment": second}
        return ServerState({"global_weights": start.clone(), **moments})

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Train from the global weights and upload where that leads."""
        weights = run.train(sent.vectors["global_weights"], steps=run.steps)
        weight = upload_weight(self.options.weighting, run)
        return Upload({"weights": weights}, weight=weight), ClientState({"weights": weights})

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Take one step of Adam along the averaged change."""
        before = server.vectors["global_weights"]
        combined = combine(self.setup, round, before, uploads, "weights")
        change = combined.double() - before.double()
        of = self.options
        first = of.beta_1 * server.vectors["first_moment"].double() + (1 - of.beta_1) * change
        second = server.vectors["second_moment"].double()
        second = of.beta_2 * second + (1 - of.beta_2) * change.square()
        after = before.double() + of.server_learning_rate * first / (second.sqrt() + of.tau)
        return ServerState(
            {
                "global_weights": after.float(),
                "first_moment": first.float(),
                "second_moment": second.float(),
            }
        )

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the global weights, and the client's after its last local training."""
        return {"global": sent.vectors["global_weights"], "local": client.vectors["weights"]}

"""FedProx: FedAvg with a proximal term that holds clients near what they were sent.

Li et al., "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127, Algorithm 2.

    client:  w_k ← w_g, then T steps on F_k(w) + (μ/2)‖w - w_g‖²,  that is
                 g ← ∇F_k(w) + μ (w - w_g)                  train/terms.py
    server:  w_g ← Σ_k n_k w_k / Σ_k n_k

w_g ``global_weights``, μ ``mu``. The paper solves each client's problem inexactly, by any solver;
here it is T steps of the recipe's optimizer. With AdamW the term is part of the gradient, and
unlike decoupled weight decay it goes through the moments. μ = 0 is FedAvg, bit for bit.

State: w_k after its last turn, only to be scored. Upload: w_k. Candidates: ``global``, ``local``
(right after this client's own T steps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pfl_lm.layout import Vector
from pfl_lm.methods.aggregate import upload_weight
from pfl_lm.methods.base import Broadcast, ClientState, LocalRun, Method, ServerState, Upload
from pfl_lm.methods.combine import combine
from pfl_lm.train import ProximalTerm

if TYPE_CHECKING:
    from pfl_lm.recipe import FedProxOptions


class FedProx(Method):
    """Average the clients' adapters, each trained under a pull towards the shared one."""

    options: FedProxOptions

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Train from the global weights, pulled towards them, and upload where that leads."""
        global_weights = sent.vectors["global_weights"]
        pull = ProximalTerm(global_weights, self.options.mu)
        weights = run.train(global_weights, steps=run.steps, callbacks=[pull])
        weight = upload_weight(self.options.weighting, run)
        return Upload({"weights": weights}, weight=weight), ClientState({"weights": weights})

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Average what was uploaded, as FedAvg does, by the recipe's rule."""
        before = server.vectors["global_weights"]
        combined = combine(self.setup, round, before, uploads, "weights")
        return ServerState({"global_weights": combined})

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the global weights, and the client's after its last local training."""
        return {"global": sent.vectors["global_weights"], "local": client.vectors["weights"]}

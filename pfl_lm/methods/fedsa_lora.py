"""FedSA-LoRA: both factors are trained, A is shared, and B stays with its client.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
arXiv 2410.01463.

    client:  A_k ← A_g and B_k as its last turn left it, then T steps on F_k(A, B) by both
    server:  A_g ← Σ_k p_k A_k,    p_k = n_k / Σ n_k

B_k is zero before a client's first turn, so its model is the untouched backbone's then. There is no
B for all, and so no ``global`` model. Robust rules and ``clip_norm`` are of A alone. With AdamW its
moments begin anew in every turn, as A's start has moved.

With one client nothing is averaged away, and it is FedAvg with one client, bit for bit.

State: (A_k, B_k) right after training, ``weights``. Sent: A_g. Upload: A_k. Candidates:
``personal`` (A_g, B_k), what the next turn starts from, and ``local`` (A_k, B_k).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pfl_lm.layout import Vector
from pfl_lm.methods.aggregate import upload_weight
from pfl_lm.methods.base import Broadcast, ClientState, LocalRun, Method, ServerState, Upload
from pfl_lm.methods.combine import combine

if TYPE_CHECKING:
    from pfl_lm.recipe import FedSALoraOptions


class FedSALora(Method):
    """Average the A factors, and leave every client its B factors."""

    options: FedSALoraOptions

    def init_server(self, start: Vector) -> ServerState:
        """Start from the A factors that every client starts from."""
        return ServerState({"global_A": self._a(start)})

    def broadcast(self, server: ServerState, client_id: str) -> Broadcast:
        """Send the shared A factors."""
        return Broadcast({"global_A": server.vectors["global_A"]})

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Train from the shared A and the client's own B; upload A alone."""
        weights = run.train(self._personal(sent, client), steps=run.steps)
        weight = upload_weight(self.options.weighting, run)
        return Upload({"A": self._a(weights)}, weight=weight), ClientState({"weights": weights})

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Average the A factors, by the recipe's rule."""
        combined = combine(self.setup, round, server.vectors["global_A"], uploads, "A")
        return ServerState({"global_A": combined})

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the shared A with the client's own B, and both as its last turn left them."""
        return {"personal": self._personal(sent, client), "local": client.vectors["weights"]}

    def _personal(self, sent: Broadcast, client: ClientState) -> Vector:
        return self.setup.layout.with_factor(
            client.vectors["weights"], "A", sent.vectors["global_A"]
        )

    def _a(self, weights: Vector) -> Vector:
        return self.setup.layout.factor(weights, "A")

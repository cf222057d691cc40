"""FFA-LoRA: the A factors stay as they were drawn; only B is trained, sent and averaged.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313.

    client:  B_k ← B_g, then T steps on F_k(A₀, B) by B alone
    server:  B_g ← Σ_k p_k B_k,    p_k = n_k / Σ n_k

A₀ is the draw of the run's seed, the same everywhere, and is never sent. With A fixed the mean of
B is exact: Σ p_k B_k A₀ = (Σ p_k B_k) A₀, which FedAvg's is not.

B_g and A₀ are the factors of ``global_weights`` at the server. Robust rules and ``clip_norm`` are
of B alone.

State: (A₀, B_k) after its last turn as ``weights``, to be scored, and for its A₀. Sent: B_g.
Upload: B_k. Candidates: ``global`` (A₀, B_g), ``local`` (A₀, B_k).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pfl_lm.layout import Vector
from pfl_lm.methods.aggregate import upload_weight
from pfl_lm.methods.base import Broadcast, ClientState, LocalRun, Method, ServerState, Upload
from pfl_lm.methods.combine import combine

if TYPE_CHECKING:
    from pfl_lm.recipe import FFALoraOptions


class FFALora(Method):
    """Average the B factors of adapters whose A factors nobody changes."""

    options: FFALoraOptions

    def broadcast(self, server: ServerState, client_id: str) -> Broadcast:
        """Send the shared B factors."""
        return Broadcast({"global_B": self._b(server.vectors["global_weights"])})

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Train B from the shared ones, and upload it."""
        weights = run.train(self._global(sent, client), steps=run.steps, trainable="B")
        weight = upload_weight(self.options.weighting, run)
        return Upload({"B": self._b(weights)}, weight=weight), ClientState({"weights": weights})

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Average the B factors, by the recipe's rule."""
        before = server.vectors["global_weights"]
        combined = combine(self.setup, round, self._b(before), uploads, "B")
        return ServerState({"global_weights": self.setup.layout.with_factor(before, "B", combined)})

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the global weights, and the client's after its last local training."""
        return {"global": self._global(sent, client), "local": client.vectors["weights"]}

    def _global(self, sent: Broadcast, client: ClientState) -> Vector:
        """Put the shared B factors to the A₀ that the client has."""
        return self.setup.layout.with_factor(
            client.vectors["weights"], "B", sent.vectors["global_B"]
        )

    def _b(self, weights: Vector) -> Vector:
        return self.setup.layout.factor(weights, "B")

"""RoLoRA: the factors take turns; in each round one is trained and averaged, the other is fixed.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
arXiv 2502.01755.

    round 1, 3, …   client:  B_k ← B_g, T steps on F_k(A_g, B) by B      server:  B_g ← Σ_k p_k B_k
    round 2, 4, …   client:  A_k ← A_g, T steps on F_k(A, B_g) by A      server:  A_g ← Σ_k p_k A_k

p_k = n_k / Σ n_k. As the other factor is the same for all, the mean is exact in every round:
Σ p_k B_k A_g = (Σ p_k B_k) A_g, and so with A. B comes first: as long as B is zero, A has no
gradient.

A_g and B_g are the factors of ``global_weights`` at the server, whose scalar ``rounds`` tells which
of them it is the turn of. Robust rules and ``clip_norm`` are of that factor alone. With AdamW its
moments begin anew in every turn.

State: what its last turn ended with, ``weights``, to be scored. Sent: A_g and B_g, since a client
may have missed rounds, and ``rounds``. Upload: the factor of the round, ``B`` or ``A``.
Candidates: ``global`` (A_g, B_g), ``local`` (right after this client's own T steps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pfl_lm.layout import Factor, Vector
from pfl_lm.methods.aggregate import upload_weight
from pfl_lm.methods.base import Broadcast, ClientState, LocalRun, Method, ServerState, Upload
from pfl_lm.methods.combine import combine

if TYPE_CHECKING:
    from pfl_lm.recipe import RoLoraOptions


class RoLora(Method):
    """Average one factor a round, B and A by turns."""

    options: RoLoraOptions

    def init_server(self, start: Vector) -> ServerState:
        """Start from the untouched adapter, before round 1."""
        return ServerState({"global_weights": start.clone()}, {"rounds": 0.0})

    def broadcast(self, server: ServerState, client_id: str) -> Broadcast:
        """Send both factors, and how many rounds are over."""
        split, weights = self.setup.layout.factor, server.vectors["global_weights"]
        factors = {"global_A": split(weights, "A"), "global_B": split(weights, "B")}
        return Broadcast(factors, dict(server.scalars))

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Train the factor of the round from the shared weights, and upload it."""
        factor = _factor_of(sent.scalars["rounds"] + 1)
        weights = run.train(self._global(sent, client), steps=run.steps, trainable=factor)
        part = self.setup.layout.factor(weights, factor)
        weight = upload_weight(self.options.weighting, run)
        return Upload({factor: part}, weight=weight), ClientState({"weights": weights})

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Average the factor of the round, by the recipe's rule."""
        factor, layout = _factor_of(round), self.setup.layout
        before = server.vectors["global_weights"]
        combined = combine(self.setup, round, layout.factor(before, factor), uploads, factor)
        after = layout.with_factor(before, factor, combined)
        return ServerState({"global_weights": after}, {"rounds": float(round)})

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the global weights, and the client's after its last local training."""
        return {"global": self._global(sent, client), "local": client.vectors["weights"]}

    def _global(self, sent: Broadcast, client: ClientState) -> Vector:
        """Put both shared factors together; of the client's own weights nothing is left."""
        layout, own = self.setup.layout, client.vectors["weights"]
        with_a = layout.with_factor(own, "A", sent.vectors["global_A"])
        return layout.with_factor(with_a, "B", sent.vectors["global_B"])


def _factor_of(round: float) -> Factor:
    """Return which factor is trained in a round, from 1."""
    return "B" if round % 2 == 1 else "A"

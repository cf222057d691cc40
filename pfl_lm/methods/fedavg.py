"""FedAvg on LoRA adapters (FedIT): one shared adapter, averaged after every round.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
arXiv 1602.05629; with LoRA: Zhang et al., "Towards Building the Federated GPT", arXiv 2305.05644.

    client:  w_k ← w_g, then T steps on F_k
    server:  w_g ← Σ_k n_k w_k / Σ_k n_k     n_k: ``weighting``, by default training rows

A and B are averaged apart, which is inexact: mean(B) mean(A) is not mean(BA).

State: w_k after its last turn, only to be scored. Candidates: ``global``, and ``local`` (the global
adapter after this client's own T steps, the fair match for other methods' local models).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pfl_lm.layout import Vector
from pfl_lm.methods.aggregate import upload_weight
from pfl_lm.methods.base import (
    Broadcast,
    ClientInfo,
    ClientState,
    LocalRun,
    Method,
    ServerState,
    Upload,
)
from pfl_lm.methods.combine import combine

if TYPE_CHECKING:
    from pfl_lm.recipe import FedAvgOptions


class FedAvg(Method):
    """Average the clients' adapters, weighted by their training examples."""

    options: FedAvgOptions

    def init_client(self, info: ClientInfo, start: Vector) -> ClientState:
        """Remember the start, which is what an untrained client would be scored with."""
        return ClientState({"weights": start.clone()})

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Train from the global weights and upload where that leads."""
        weights = run.train(sent.vectors["global_weights"], steps=run.steps)
        weight = upload_weight(self.options.weighting, run)
        return Upload({"weights": weights}, weight=weight), ClientState({"weights": weights})

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Average what was uploaded, by the recipe's rule."""
        before = server.vectors["global_weights"]
        combined = combine(self.setup, round, before, uploads, "weights")
        return ServerState({"global_weights": combined})

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the global weights, and the client's after its last local training."""
        return {"global": sent.vectors["global_weights"], "local": client.vectors["weights"]}

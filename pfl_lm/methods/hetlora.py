"""HetLoRA: adapters of several ranks, filled up with zeros to be averaged, cut to be sent.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
arXiv 2401.06432.

    client:  A_k ← A_g[:r_k], B_k ← B_g[:, :r_k], then T steps on F_k by both
    server:  A_g ← Σ_k p_k A_k and B_g ← Σ_k p_k B_k, each A_k and B_k filled up with zeros to the
             largest rank
             p_k = S_k / Σ S_k,  S_k = ‖B_k A_k‖                      methods/mixed.py

S_k is the Frobenius norm over all of a client's modules: adapters that do little weigh little, and
so do the zeros they are filled up with (``weighting: sparsity``). With another weighting, and one
rank for all, it is FedAvg, bit for bit.

Where the paper is silent: of rows and columns that no client of a round has, and of modules that
none adapts, the server keeps what it had, since zeros in both factors have no gradient and would
stay zeros for good. A module is averaged over the clients that adapt it. If no adapter has any
effect, all weigh alike. The paper's pruning of ranks while training is not here: a client's rank is
what the recipe says.

State: A_k, B_k after its last turn, ``weights``, only to be scored. Upload: the same. All are of
the client's own rank and modules. Candidates: ``global`` (A_g, B_g, cut to r_k), ``local`` (right
after this client's own T steps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pfl_lm.layout import Vector
from pfl_lm.methods.aggregate import checked, upload_weight
from pfl_lm.methods.base import Broadcast, ClientState, LocalRun, Method, ServerState, Upload
from pfl_lm.methods.mixed import Filled, cut_for, effect, mean_of_known

if TYPE_CHECKING:
    from pfl_lm.recipe import HetLoraOptions


class HetLora(Method):
    """Average adapters of several ranks, the larger where the smaller have zeros."""

    options: HetLoraOptions

    def broadcast(self, server: ServerState, client_id: str) -> Broadcast:
        """Send as much of the shared adapter as this client has room for."""
        return cut_for(self.setup, server, client_id)

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Train from the cut global weights and upload where that leads."""
        weights = run.train(sent.vectors["global_weights"], steps=run.steps)
        how = self.options.weighting
        weight = 1.0 if how == "sparsity" else upload_weight(how, run)
        return Upload({"weights": weights}, weight=weight), ClientState({"weights": weights})

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Average what was uploaded, by the effect of each adapter or as the recipe says."""
        before = server.vectors["global_weights"]
        weights = [upload.weight for upload in uploads]
        if self.options.weighting == "sparsity":
            alike = Filled(self.setup, uploads, [1.0] * len(uploads))
            weights = [effect(self.setup.layout, vector) for vector, _ in checked(alike, before)]
            weights = weights if any(weights) else [1.0] * len(uploads)
        return ServerState({"global_weights": mean_of_known(self.setup, before, uploads, weights)})

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the cut global weights, and the client's after its last local training."""
        return {"global": sent.vectors["global_weights"], "local": client.vectors["weights"]}

"""FlexLoRA: the products B A are averaged, and each client gets the best of its own rank.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", arXiv 2402.11505.

    client:  B_k ← U[:, :r_k] Σ[:r_k], A_k ← Vᵀ[:r_k], then T steps on F_k by both
    server:  M ← Σ_k p_k B_k A_k,  M = U Σ Vᵀ                   module by module, methods/svd.py

p_k = n_k / Σ n_k over the clients that adapt the module; the scale s of s B A is the same for all
and cancels. So what is averaged is what adapters do, where FedAvg averages their factors; only what
is beyond the largest rank r is lost, and the server keeps that much: A_g = Vᵀ[:r], B_g = U[:, :r]
Σ[:r]. The first r_k rows and columns of these are the best approximation of rank r_k.

Singular vectors are given up to their sign, here such that the largest number of a row of Vᵀ is
positive. Where M has a rank below r, the rest of B_g is zero and A_g keeps the rows it had, as in
an adapter before its training: zeros there too could never be trained again. A module that no
client of a round adapts stays as it was.

State: B_k, A_k after its last turn, ``weights``, only to be scored. Upload: the same. All are of
the client's own rank and modules. Candidates: ``global`` (cut to r_k), ``local`` (right after this
client's own T steps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pfl_lm.layout import Vector
from pfl_lm.methods.aggregate import checked, upload_weight
from pfl_lm.methods.base import Broadcast, ClientState, LocalRun, Method, ServerState, Upload
from pfl_lm.methods.mixed import Filled, cut_for, own_vectors
from pfl_lm.methods.svd import in_chunks

if TYPE_CHECKING:
    from pfl_lm.recipe import FlexLoraOptions


class FlexLora(Method):
    """Average what the clients' adapters do, and cut the average to each client's rank."""

    options: FlexLoraOptions

    def broadcast(self, server: ServerState, client_id: str) -> Broadcast:
        """Send as much of the shared adapter as this client has room for, the most of it first."""
        return cut_for(self.setup, server, client_id)

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Train from the cut global weights and upload where that leads."""
        weights = run.train(sent.vectors["global_weights"], steps=run.steps)
        weight = upload_weight(self.options.weighting, run)
        return Upload({"weights": weights}, weight=weight), ClientState({"weights": weights})

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Average the products, a few modules at a time; each such few read all uploads once.

        Raises:
            AggregationError: the uploads do not fit together, are not finite, or weigh nothing.
        """
        layout, before = self.setup.layout, server.vectors["global_weights"]
        told = [(upload.weight, self.setup.layout_of(upload.client)) for upload in uploads]
        weights, owns = [weight for weight, _ in told], [own for _, own in told]
        for _ in checked(Filled(self.setup, uploads, weights), before):
            pass  # nothing is done with any before all are known to be sound
        after = before.clone()
        named = layout.split(after)
        for some in in_chunks(layout, owns):
            for (own, vector), weight in zip(
                own_vectors(self.setup, uploads), weights, strict=True
            ):
                theirs = own.split(vector)
                for a, b, mean in some:
                    if a.name in theirs:
                        mean.add(theirs[b.name], theirs[a.name], weight)
            for a, b, mean in some:
                mean.write_best(named[b.name], named[a.name])
        return ServerState({"global_weights": after})

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the cut global weights, and the client's after its last local training."""
        return {"global": sent.vectors["global_weights"], "local": client.vectors["weights"]}

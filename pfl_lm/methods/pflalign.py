"""pFLAlign: gradients preconditioned per client, and each client realigned after aggregation.

Kim & Lee, "Personalized Federated Learning for Gradient Alignment", arXiv 2605.02143, Algorithm 1:

    client:  w ← w_g + Δ_i,  m ← 0                          realigned start
             for t = 1 … T:
                 m, v, P, γ ← from g = ∇F_i(w)              align/moments.py
                 w ← w - η P ⊙ g - (1/T) γ ⊙ Δ_i            train/alignment.py
             Δ_i ← w - w_g                                  offset after the round
    server:  w_g ← Σ_k n_k w_k / Σ_k n_k

State: v ``second_moment``, P ``preconditioner``, Δ ``offset``, w ``weights`` (to be scored as it
is). The moments m, v, P, Δ and w are fp32 whatever the backbone's dtype. The upload w tells the
server Δ_i, since it knows the w_g it sent; v, P and the data stay private.

With ``offset_reference: post`` Δ_i is w - w_g of the w_g that the *next* turn receives: a client
goes on where it ended, and the w_g it is pulled towards is always the newest.

With ``stale_offset: decay`` a client that missed k rounds since its last turn takes Δ_i ⊙ (1-Γ_i)^k
for Δ_i, when it starts and when it is scored; Γ_i ``correction`` is the mean of γ over that turn.
Then server and clients also count ``rounds``: those averaged so far, and those averaged with the
client's last turn.

Candidates: ``realigned`` (w_g + Δ_i, what the next round starts from), ``local`` (w right after
training), ``global`` (w_g).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from pfl_lm.align import AlignmentState, decayed_offset, offset_after_round, realigned_start
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
from pfl_lm.train import AggregationRealignment, AlignmentTurn, GradientPreconditioner

if TYPE_CHECKING:
    import lightning as L

    from pfl_lm.recipe import PFLAlignOptions


class PFLAlign(Method):
    """Personalize by gradient alignment (Algorithm 1), with its ablations as options."""

    options: PFLAlignOptions

    def init_server(self, start: Vector) -> ServerState:
        """Start from the untouched adapter, before round 1."""
        return ServerState({"global_weights": start.clone()}, self._count(0))

    def init_client(self, info: ClientInfo, start: Vector) -> ClientState:
        """Start with Δ, v and P (and Γ) at zero: the first realigned start is w_g itself."""
        names = ["offset", "second_moment", "preconditioner"]
        if self._decays:
            names.append("correction")
        zeros = {name: torch.zeros_like(start) for name in names}
        return ClientState({"weights": start.clone(), **zeros}, {"turns": 0.0, **self._count(0)})

    def broadcast(self, server: ServerState, client_id: str) -> Broadcast:
        """Send w_g and, if offsets decay, how many rounds it has seen."""
        return Broadcast({"global_weights": server.vectors["global_weights"]}, {**server.scalars})

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Run one round of Algorithm 1 on this client."""
        global_weights = sent.vectors["global_weights"]
        offset = self._offset(sent, client)
        turn = AlignmentTurn(
            _moments(client),
            offset,
            run.steps,
            beta=self.options.beta,
            eps=self.options.eps,
            correction=self.options.correction,
        )

        start = self._start(client, global_weights, offset)
        weights = run.train(start, steps=run.steps, callbacks=self._callbacks(turn, run))
        offset = offset_after_round(weights, global_weights)

        run.summary.update(turn.summary(), offset_norm=float(offset.norm()))
        kept = {
            "weights": weights,
            "offset": offset,
            "second_moment": turn.state.second_moment,
            "preconditioner": turn.state.preconditioner,
        }
        scalars = {"turns": 1.0}
        if self._decays:
            run.summary["missed_rounds"] = float(_missed(sent, client))
            kept["correction"] = turn.correction_taken()
            scalars |= self._count(sent.scalars["rounds"] + 1)
        weight = upload_weight(self.options.weighting, run)
        return Upload({"weights": weights}, weight=weight), ClientState(kept, scalars)

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Average what was uploaded, as FedAvg does, by the recipe's rule."""
        before = server.vectors["global_weights"]
        combined = combine(self.setup, round, before, uploads, "weights")
        count = self._count(server.scalars["rounds"] + 1) if self._decays else {}
        return ServerState({"global_weights": combined}, count)

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the realigned start of the next round, the local and the global weights."""
        global_weights = sent.vectors["global_weights"]
        if self.options.offset_reference == "post":  # it goes on where it ended
            return {"local": client.vectors["weights"], "global": global_weights}
        others = {"local": client.vectors["weights"], "global": global_weights}
        if not self.options.personalized_start:  # the next round starts from w_g itself
            return {"global": global_weights, **others}
        return {"realigned": realigned_start(global_weights, self._offset(sent, client)), **others}

    @property
    def _decays(self) -> bool:
        return self.options.stale_offset == "decay"

    def _count(self, rounds: float) -> dict[str, float]:
        """Return the scalar of a state that knows of so many rounds: none unless offsets decay."""
        return {"rounds": float(rounds)} if self._decays else {}

    def _offset(self, sent: Broadcast, client: ClientState) -> Vector:
        """Return Δ: kept since the last turn, or formed now from the w_g just received."""
        if self.options.offset_reference == "post" and client.scalars["turns"]:
            return offset_after_round(client.vectors["weights"], sent.vectors["global_weights"])
        offset = client.vectors["offset"]
        if not self._decays:
            return offset
        return decayed_offset(offset, client.vectors["correction"], _missed(sent, client))

    def _start(self, client: ClientState, global_weights: Vector, offset: Vector) -> Vector:
        if not self.options.personalized_start:
            return global_weights
        if self.options.offset_reference == "post" and client.scalars["turns"]:
            return client.vectors["weights"]  # w_g + Δ, without its rounding
        return realigned_start(global_weights, offset)

    def _callbacks(self, turn: AlignmentTurn, run: LocalRun) -> list[L.Callback]:
        preconditioner = GradientPreconditioner(
            turn,
            self.setup.layout,
            run.learning_rate,
            enabled=self.options.preconditioner,
            target=self.options.precondition_target,
            scale=self.options.update_scale,
        )
        return [preconditioner, AggregationRealignment(turn)]


def _missed(sent: Broadcast, client: ClientState) -> int:
    """Return k, the rounds that were averaged without this client since its last turn.

    A turn whose round was never averaged may be ahead of the server: it has missed none.
    """
    return max(0, int(sent.scalars["rounds"] - client.scalars["rounds"]))


def _moments(client: ClientState) -> AlignmentState:
    """Return the client's moments as a copy that this turn may change."""
    second = client.vectors["second_moment"]
    return AlignmentState(
        first_moment=torch.zeros_like(second),
        second_moment=second.clone(),
        preconditioner=client.vectors["preconditioner"].clone(),
    )

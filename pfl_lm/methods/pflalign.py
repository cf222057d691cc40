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

Candidates: ``realigned`` (w_g + Δ_i, what the next round starts from), ``local`` (w right after
training), ``global`` (w_g).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from pfl_lm.align import AlignmentState, offset_after_round, realigned_start
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

    def init_client(self, info: ClientInfo, start: Vector) -> ClientState:
        """Start with Δ, v and P at zero: the first realigned start is w_g itself."""
        names = ("offset", "second_moment", "preconditioner")
        zeros = {name: torch.zeros_like(start) for name in names}
        return ClientState({"weights": start.clone(), **zeros}, {"turns": 0.0})

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Run one round of Algorithm 1 on this client."""
        global_weights = sent.vectors["global_weights"]
        offset = self._offset(client, global_weights)
        turn = AlignmentTurn(
            _moments(client),
            offset,
            run.steps,
            beta=self.options.beta,
            eps=self.options.eps,
            correction=self.options.correction,
        )

        start = self._start(client, global_weights, offset)
        weights = run.train(start, steps=run.steps, callbacks=self._callbacks(turn))
        offset = offset_after_round(weights, global_weights)

        run.summary.update(turn.summary(), offset_norm=float(offset.norm()))
        kept = {
            "weights": weights,
            "offset": offset,
            "second_moment": turn.state.second_moment,
            "preconditioner": turn.state.preconditioner,
        }
        weight = upload_weight(self.options.weighting, run)
        return Upload({"weights": weights}, weight=weight), ClientState(kept, {"turns": 1.0})

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Average what was uploaded, as FedAvg does, by the recipe's rule."""
        before = server.vectors["global_weights"]
        combined = combine(self.setup, round, before, uploads, "weights")
        return ServerState({"global_weights": combined})

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the realigned start of the next round, the local and the global weights."""
        global_weights = sent.vectors["global_weights"]
        if self.options.offset_reference == "post":  # it goes on where it ended
            return {"local": client.vectors["weights"], "global": global_weights}
        others = {"local": client.vectors["weights"], "global": global_weights}
        if not self.options.personalized_start:  # the next round starts from w_g itself
            return {"global": global_weights, **others}
        return {"realigned": realigned_start(global_weights, client.vectors["offset"]), **others}

    def _offset(self, client: ClientState, global_weights: Vector) -> Vector:
        """Return Δ: kept since the last turn, or formed now from the w_g just received."""
        if self.options.offset_reference == "post" and client.scalars["turns"]:
            return offset_after_round(client.vectors["weights"], global_weights)
        return client.vectors["offset"]

    def _start(self, client: ClientState, global_weights: Vector, offset: Vector) -> Vector:
        if not self.options.personalized_start:
            return global_weights
        if self.options.offset_reference == "post" and client.scalars["turns"]:
            return client.vectors["weights"]  # w_g + Δ, without its rounding
        return realigned_start(global_weights, offset)

    def _callbacks(self, turn: AlignmentTurn) -> list[L.Callback]:
        preconditioner = GradientPreconditioner(
            turn,
            self.setup.layout,
            self.setup.training.learning_rate,
            enabled=self.options.preconditioner,
            target=self.options.precondition_target,
            scale=self.options.update_scale,
        )
        return [preconditioner, AggregationRealignment(turn)]


def _moments(client: ClientState) -> AlignmentState:
    """Return the client's moments as a copy that this turn may change."""
    second = client.vectors["second_moment"]
    return AlignmentState(
        first_moment=torch.zeros_like(second),
        second_moment=second.clone(),
        preconditioner=client.vectors["preconditioner"].clone(),
    )

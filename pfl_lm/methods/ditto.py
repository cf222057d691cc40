"""Ditto: a shared model by FedAvg, and a personal one that is trained near it.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", arXiv 2012.04221,
Algorithm 1.

    client:  w_k ← w_g, then T steps on F_k                            the shared path, as FedAvg
             from v_k, T steps on F_k(v) + (λ/2)‖v - w_g‖²,  that is   the personal path
                 g ← ∇F_k(v) + λ (v - w_g)                             train/terms.py
    server:  w_g ← Σ_k n_k w_k / Σ_k n_k                               of the w_k alone

w_g ``global_weights`` as this round received it, v_k ``personal``, λ ``lam``. v_k starts from the
adapter that everybody starts from, and never leaves the client.

A turn is two trainings on the same batches, 2 T optimizer steps: compare it with methods of 2 T, or
give it half the steps. AdamW begins anew on the shared path, whose start has moved, and goes on
from turn to turn on the personal path. So λ = 0 is `local` there, bit for bit, and FedAvg on the
shared path for any λ.

State: v_k, w_k after its last turn, only to be scored, and AdamW's moments of the personal path.
Upload: w_k. Candidates: ``personal`` (v_k), ``global``, ``local`` (w_k, right after training).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

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
from pfl_lm.methods.moments import fresh_moments, kept_moments, with_moments
from pfl_lm.train import ProximalTerm

if TYPE_CHECKING:
    from pfl_lm.recipe import DittoOptions


class Ditto(Method):
    """Average one path of training, and let the other follow it at a distance."""

    options: DittoOptions
    fits: ClassVar[int] = 2

    def init_client(self, info: ClientInfo, start: Vector) -> ClientState:
        """Start both paths from the adapter that every client starts from."""
        vectors = {"weights": start.clone(), "personal": start.clone()}
        return with_moments(vectors, fresh_moments(self.setup.training, start))

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Train on the shared path, which is uploaded, and then on the personal one."""
        global_weights = sent.vectors["global_weights"]
        weights = run.train(global_weights, steps=run.steps)
        losses = {name: run.summary[name] for name in run.summary if name.startswith("loss_")}
        run.summary.update({f"shared_{name}": loss for name, loss in losses.items()})

        moments = kept_moments(client)
        pull = ProximalTerm(global_weights, self.options.lam)
        personal = run.train(
            client.vectors["personal"], steps=run.steps, callbacks=[pull], moments=moments
        )
        run.summary["distance"] = float((personal - global_weights).norm())
        upload = Upload({"weights": weights}, weight=upload_weight(self.options.weighting, run))
        return upload, with_moments({"weights": weights, "personal": personal}, moments)

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Average the shared paths, as FedAvg does, by the recipe's rule."""
        before = server.vectors["global_weights"]
        combined = combine(self.setup, round, before, uploads, "weights")
        return ServerState({"global_weights": combined})

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the personal weights, the global ones, and the shared path's last end."""
        return {
            "personal": client.vectors["personal"],
            "global": sent.vectors["global_weights"],
            "local": client.vectors["weights"],
        }

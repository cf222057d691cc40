"""SCAFFOLD: control variates take each client's drift out of its local steps.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
arXiv 1910.06378, Algorithm 1 with option II.

    client:  y ← x;  T times  y ← y - η (∇F_i(y) - c_i + c)         train/terms.py
             c_i⁺ ← c_i - c + (x - y) / (T η)
    server:  x ← x + η_g · mean_S(y_i - x)
             c ← c + |S|/N · mean_S(c_i⁺ - c_i)

x ``global_weights``, y ``weights``, c and c_i ``control`` (both 0 at first), η the learning rate,
η_g ``server_learning_rate``, S the clients of the round, N all clients. Clients count alike. So c_i
is the mean of the gradients that client i saw in its last turn, and c is the mean of all c_i.

T and η are each client's own, since the recipe may give a client others: c_i is a mean of gradients
all the same, and every corrected step goes along the mean of all clients' gradients, so that who
steps more or further only gets there sooner.

The paper sends c_i⁺ - c_i as well. By option II it is (x - y) / (T η) - c, so y and T tell it, and
the server, which knows η, works it out. Only with plain SGD is (x - y) / (T η) a mean of gradients:
AdamW is refused. So are robust rules: c has to stay the mean of all c_i, else each round is off by
what is missing, for good. For the same reason

* a turn that goes uncounted (the first of a client that has joined) leaves c_i as it was,
* when the number of clients has changed, c becomes that share of the same sum,
* a step that was left out, since its gradient overflowed in float16, is none of the T,
* a client can be removed only together with all rounds (``pfl-lm remove --replay``).

State: c_i, and y to be scored. Upload: y, and T as a number. Candidates: ``global`` (x), ``local``
(y, right after this client's own T steps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from pfl_lm.layout import Vector
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
from pfl_lm.train import GradientShift

if TYPE_CHECKING:
    from pfl_lm.recipe import ScaffoldOptions


class Scaffold(Method):
    """Average the clients' adapters, each trained with its drift taken out."""

    options: ScaffoldOptions

    def init_server(self, start: Vector) -> ServerState:
        """Start with c at zero."""
        vectors = {"global_weights": start.clone(), "control": torch.zeros_like(start)}
        return ServerState(vectors, {"n_clients": float(self.setup.n_clients)})

    def init_client(self, info: ClientInfo, start: Vector) -> ClientState:
        """Start with c_i at zero."""
        return ClientState({"weights": start.clone(), "control": torch.zeros_like(start)})

    def broadcast(self, server: ServerState, client_id: str) -> Broadcast:
        """Send x and c, to every client the same."""
        return Broadcast({name: server.vectors[name] for name in ("global_weights", "control")})

    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Train with corrected gradients, and form the new c_i."""
        start, control = sent.vectors["global_weights"], sent.vectors["control"]
        own = client.vectors["control"]
        weights = run.train(start, steps=run.steps, callbacks=[GradientShift(control - own)])
        kept = own.clone()
        steps = run.steps - int(run.summary.get("skipped_steps", 0))
        if sent.counted and steps:
            length = steps * run.learning_rate
            kept = (own.double() + _change(start, weights, control, length)).float()
        run.summary["control_norm"] = float(kept.norm())
        upload = Upload({"weights": weights}, weight=1.0, scalars={"steps": float(steps)})
        return upload, ClientState({"weights": weights, "control": kept})

    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Step towards the mean of the clients, and keep c the mean of all c_i."""
        start, control = server.vectors["global_weights"], server.vectors["control"]
        mean = combine(self.setup, round, start, uploads, "weights")
        rate = self.options.server_learning_rate
        after = start.double() + rate * (mean.double() - start.double())

        total = server.scalars["n_clients"] * control.double()  # Σ c_i over all clients
        for upload in uploads:
            steps, end = upload.scalars["steps"], upload.vectors["weights"]
            if steps >= 1 or not torch.equal(start, end):  # who took no step has not moved
                length = max(1.0, steps) * self.setup.rate_of(upload.client)
                total += _change(start, end, control, length)
        n_clients = float(self.setup.n_clients)
        vectors = {"global_weights": after.float(), "control": (total / n_clients).float()}
        return ServerState(vectors, {"n_clients": n_clients})

    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the global weights, and the client's after its last local training."""
        return {"global": sent.vectors["global_weights"], "local": client.vectors["weights"]}


def _change(start: Vector, end: Vector, control: Vector, length: float) -> Vector:
    """Return c_i⁺ - c_i = (x - y) / (T η) - c, in float64; ``length`` is T η."""
    return (start.double() - end.double()) / length - control.double()

"""Whole federations in float64, each rule as its paper has it; never from `pfl_lm.methods`.

A client k is asked for the gradient of its batches at any w, in the order of its steps. Clients
weigh by their train rows unless a paper says otherwise. Every function returns the shared weights
after the last round, and what each client holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.parity.plain import PlainClient
from tests.parity.runs import CLIENTS, ROUNDS, batches, examples

Gradient = Callable[[Tensor], Tensor]
Held = dict[str, Tensor]


@dataclass
class Federation:
    """The clients of a run in ``folder``: their gradients and sizes; η and the common start."""

    folder: Path
    plain: PlainClient
    start: Tensor
    eta: float
    clients: tuple[str, ...] = CLIENTS
    rounds: int = ROUNDS

    def gradients(self, client: str, round: int) -> list[Gradient]:
        """Return a client's gradient of each of its T steps in a round."""

        def of(batch: object) -> Gradient:
            def gradient(w: Tensor) -> Tensor:
                self.plain.w = w.float()
                return self.plain.gradient(batch).double()  # type: ignore[arg-type]

            return gradient

        return [of(batch) for batch in batches(self.folder, client, round)]

    def mean(self, vectors: dict[str, Tensor]) -> Tensor:
        n = {client: len(examples(self.folder, client)) for client in vectors}
        return sum(n[k] * vectors[k] for k in vectors) / sum(n.values())  # type: ignore[return-value]

    def only(self, factor: str) -> Tensor:
        """1 where a number belongs to an A or a B factor, else 0."""
        named = [(n, p) for n, p in self.plain.model.named_parameters() if p.requires_grad]
        parts = [torch.full((p.numel(),), f"lora_{factor}" in name) for name, p in named]
        return torch.cat(parts).double()


def descend(
    w: Tensor, gradients: list[Gradient], eta: float, more: Gradient | None = None
) -> Tensor:
    """w ← w - η (∇F(w) + more(w)) for each step."""
    for gradient in gradients:
        w = w - eta * (gradient(w) + (0 if more is None else more(w)))
    return w


def fedprox(fed: Federation, mu: float) -> tuple[Tensor, Held]:
    """Li et al. 2018, with T gradient steps for the inexact solution: h(w) = F + μ/2‖w - w_g‖²."""
    shared, ends = fed.start.double(), {}
    for round in range(1, fed.rounds + 1):
        at = shared

        def pull(w: Tensor, at: Tensor = at) -> Tensor:
            return mu * (w - at)

        for k in fed.clients:
            ends[k] = descend(shared, fed.gradients(k, round), fed.eta, pull)
        shared = fed.mean(ends)
    return shared, ends


def fedavg_ends(fed: Federation, shared: Tensor, round: int) -> Held:
    return {k: descend(shared, fed.gradients(k, round), fed.eta) for k in fed.clients}


def fedavgm(fed: Federation, beta: float, eta_s: float) -> tuple[Tensor, Held]:
    """Hsu et al. 2019: v ← βv + Δ, w ← w - v, with Δ = -D; here with a server rate."""
    shared, velocity, ends = fed.start.double(), torch.zeros(len(fed.start)).double(), {}
    for round in range(1, fed.rounds + 1):
        ends = fedavg_ends(fed, shared, round)
        gradient = shared - fed.mean(ends)
        velocity = beta * velocity + gradient
        shared = shared - eta_s * velocity
    return shared, ends


def fedadam(
    fed: Federation, eta_s: float, beta_1: float, beta_2: float, tau: float
) -> tuple[Tensor, Held]:
    """Reddi et al. 2021, Algorithm 2, FedAdam; v₋₁ = τ²."""
    shared, ends = fed.start.double(), {}
    m, v = torch.zeros_like(shared), torch.zeros_like(shared) + tau * tau
    for round in range(1, fed.rounds + 1):
        ends = fedavg_ends(fed, shared, round)
        delta = fed.mean({k: ends[k] - shared for k in fed.clients})
        m = beta_1 * m + (1 - beta_1) * delta
        v = beta_2 * v + (1 - beta_2) * delta**2
        shared = shared + eta_s * m / (torch.sqrt(v) + tau)
    return shared, ends


def scaffold(
    fed: Federation, eta_g: float, cohorts: list[list[str]], *, corrected: bool = True
) -> tuple[Tensor, Held, Tensor, Held]:
    """Karimireddy et al. 2020, Algorithm 1, option II; also returns c and every c_i."""
    x, y = fed.start.double(), {}
    c, zero = torch.zeros_like(x), torch.zeros_like(x)
    c_of = dict.fromkeys(fed.clients, zero)
    for round, cohort in enumerate(cohorts, 1):
        delta_y, delta_c = [], []
        for i in cohort:
            gradients = fed.gradients(i, round)
            correction = c - c_of[i] if corrected else zero
            y[i] = descend(x, gradients, fed.eta, lambda w, shift=correction: shift)
            c_plus = c_of[i] - c + (x - y[i]) / (len(gradients) * fed.eta)
            delta_y.append(y[i] - x)
            delta_c.append(c_plus - c_of[i])
            c_of[i] = c_plus
        x = x + eta_g * torch.stack(delta_y).mean(0)
        c = c + len(cohort) / len(fed.clients) * torch.stack(delta_c).mean(0)
    return x, y, c, c_of


def ditto(fed: Federation, lam: float) -> tuple[Tensor, Held, Held]:
    """Li et al. 2021, Algorithm 1; also returns the personal models v_k."""
    shared, ends = fed.start.double(), {}
    v = dict.fromkeys(fed.clients, shared)
    for round in range(1, fed.rounds + 1):
        at = shared

        def pull(w: Tensor, at: Tensor = at) -> Tensor:
            return lam * (w - at)

        for k in fed.clients:
            gradients = fed.gradients(k, round)
            ends[k] = descend(shared, gradients, fed.eta)
            v[k] = descend(v[k], gradients, fed.eta, pull)
        shared = fed.mean(ends)
    return shared, ends, v


def ffa_lora(fed: Federation) -> tuple[Tensor, Held]:
    """Sun et al. 2024: only B is trained and averaged; A is the first draw for ever."""
    shared, ends, b = fed.start.double(), {}, fed.only("B")
    for round in range(1, fed.rounds + 1):
        for k in fed.clients:
            gradients = [lambda w, g=g: b * g(w) for g in fed.gradients(k, round)]
            ends[k] = descend(shared, gradients, fed.eta)
        shared = fed.mean(ends)
    return shared, ends


def fedsa_lora(fed: Federation) -> tuple[Tensor, Held]:
    """Guo et al. 2025: every client trains both; A is averaged, B stays."""
    a, b = fed.only("A"), fed.only("B")
    shared_a, own = a * fed.start.double(), dict.fromkeys(fed.clients, fed.start.double())
    for round in range(1, fed.rounds + 1):
        for k in fed.clients:
            own[k] = descend(shared_a + b * own[k], fed.gradients(k, round), fed.eta)
        shared_a = a * fed.mean(own)
    return shared_a, own


def rolora(fed: Federation) -> tuple[Tensor, Held]:
    """Chen et al. 2025: B in odd rounds, A in even ones."""
    shared, ends = fed.start.double(), {}
    for round in range(1, fed.rounds + 1):
        turn = fed.only("B" if round in (1, 3, 5) else "A")
        for k in fed.clients:
            gradients = [lambda w, g=g, turn=turn: turn * g(w) for g in fed.gradients(k, round)]
            ends[k] = descend(shared, gradients, fed.eta)
        shared = fed.mean(ends)
    return shared, ends


@dataclass
class Ranks:
    """Whose adapter has which rank, the server's the largest; matrices as PEFT orders them.

    A client's adapter is the server's with the rest of it zero, and takes no step there.
    """

    shapes: list[tuple[int, int]]
    largest: int
    of: dict[str, int]

    def matrices(self, w: Tensor) -> list[Tensor]:
        parts = w.split([rows * columns for rows, columns in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def flat(self, matrices: list[Tensor]) -> Tensor:
        return torch.cat([matrix.reshape(-1) for matrix in matrices])

    def cut(self, w: Tensor, r: int) -> Tensor:
        """Zero all but the first r rows of A and columns of B; PEFT has A before B."""
        kept = [matrix.clone() for matrix in self.matrices(w)]
        for a, b in zip(kept[::2], kept[1::2], strict=True):
            a[r:], b[:, r:] = 0, 0
        return self.flat(kept)


def hetlora(fed: Federation, ranks: Ranks) -> tuple[Tensor, Held]:
    """Cho et al. 2024: truncate, train, pad with zeros, weigh by ‖B A‖_F; no pruning."""
    shared, ends = fed.start.double(), {}
    for round in range(1, fed.rounds + 1):
        norms = {}
        for k in fed.clients:
            of_k = ranks.cut(torch.ones_like(shared), ranks.of[k])
            gradients = [lambda w, g=g, m=of_k: m * g(w) for g in fed.gradients(k, round)]
            ends[k] = descend(of_k * shared, gradients, fed.eta)
            m = ranks.matrices(ends[k])
            delta = [b @ a for a, b in zip(m[::2], m[1::2], strict=True)]
            norms[k] = torch.cat([d.reshape(-1) for d in delta]).norm()
        shared = sum(norms[k] / sum(norms.values()) * ends[k] for k in fed.clients)  # type: ignore[assignment]
    return shared, ends


def flexlora(fed: Federation, ranks: Ranks) -> tuple[list[Tensor], Held]:
    """Bai et al. 2024: average B A by rows, SVD of the whole matrix, cut to each client's rank.

    Returns the mean products of the last round and the clients' ends.
    """
    shared, ends, products = fed.start.double(), {}, list[Tensor]()
    n = {k: len(examples(fed.folder, k)) for k in fed.clients}
    for round in range(1, fed.rounds + 1):
        for k in fed.clients:
            of_k = ranks.cut(torch.ones_like(shared), ranks.of[k])
            gradients = [lambda w, g=g, m=of_k: m * g(w) for g in fed.gradients(k, round)]
            ends[k] = descend(of_k * shared, gradients, fed.eta)
        matrices, products = [], []
        for i in range(0, len(ranks.shapes), 2):
            each = {k: ranks.matrices(ends[k])[i : i + 2] for k in fed.clients}
            mean = sum(n[k] * b @ a for k, (a, b) in each.items()) / sum(n.values())
            products.append(mean)  # type: ignore[arg-type]
            u, s, vt = torch.linalg.svd(mean)
            u, s, vt = u[:, : ranks.largest], s[: ranks.largest], vt[: ranks.largest]
            matrices += [vt, u * s]
        shared = ranks.flat(matrices)
    return products, ends

"""What a federated method is: a handful of rules over flat adapter vectors.

    init_server ──► broadcast ──► turn (on the client) ──► Upload ──► aggregate ──► …
                                    │
    init_client ──► ClientState ────┘  stays with the client; only an Upload leaves

A vector is fp32 of shape ``(d,)`` by the client's own layout. No method touches a model, a
file or another client's state; what it may do with a client's data is in :class:`LocalRun`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pfl_lm.layout import AdapterLayout, Factor, Vector
from pfl_lm.recipe import AggregationOptions

if TYPE_CHECKING:
    import lightning as L

    from pfl_lm.privacy.clients import ClientLevel
    from pfl_lm.recipe import TrainingOptions
    from pfl_lm.train import Moments


SHARED = "global_"
"""How the names of shared weights begin: an upload's ``X`` answers the ``global_X`` it was sent."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every method is told of the run: the server's layout, and the recipe beside the method.

    ``aggregation`` and ``client_level`` are for `combine`, which a method that averages calls.
    ``layouts`` are of the clients whose adapters are smaller than the server's ``layout``, and
    ``rates`` of those whose learning rate is not that of ``training``.
    """

    layout: AdapterLayout
    n_clients: int
    seed: int
    training: TrainingOptions
    aggregation: AggregationOptions = field(default_factory=AggregationOptions)
    client_level: ClientLevel | None = None
    layouts: Mapping[str, AdapterLayout] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)

    def layout_of(self, client: str) -> AdapterLayout:
        """Return the layout of a client's own adapter."""
        return self.layouts.get(client, self.layout)

    def rate_of(self, client: str) -> float:
        """Return η of a client."""
        return self.rates.get(client, self.training.learning_rate)


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """What a method is told of one client; ``n_examples`` are its training rows.

    ``layout`` is of the client's own vectors.
    """

    id: str
    n_examples: int
    layout: AdapterLayout


@dataclass(frozen=True, slots=True)
class ServerState:
    """What the server keeps between rounds."""

    vectors: dict[str, Vector]
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClientState:
    """What one client keeps between its turns. It never leaves the client."""

    vectors: dict[str, Vector]
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What one client gets to see of the server, and no more.

    ``counted`` is False in a turn whose upload is not aggregated: the first of a client that has
    joined a run.
    """

    vectors: dict[str, Vector]
    scalars: dict[str, float] = field(default_factory=dict)
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Upload:
    """All that leaves a client: vectors, its weight in averages, and a few numbers.

    A vector ``X`` that goes on from the ``global_X`` of the broadcast is named so, and is checked
    against it before it counts. ``client``, whose it is, is what the server knows of it and not
    what a turn says: methods by which clients' adapters differ in shape go by it.
    """

    vectors: dict[str, Vector]
    weight: float
    scalars: dict[str, float] = field(default_factory=dict)
    client: str = ""


class LocalRun(Protocol):
    """What a method may do on the client's machine during one turn.

    Attributes:
        steps: T, the planned optimizer steps of the turn.
        n_examples: the client's training rows.
        n_tokens: their supervised tokens.
        learning_rate: η, the step size of this client.
        summary: plain numbers about the turn, for the ledger; a method may add to it.
    """

    steps: int
    n_examples: int
    n_tokens: int
    learning_rate: float
    summary: dict[str, float]

    def train(
        self,
        start: Vector,
        *,
        steps: int,
        callbacks: Sequence[L.Callback] = (),
        trainable: Factor | None = None,
        moments: Moments | None = None,
    ) -> Vector:
        """Run one fit from ``start``; return where it ends. ``moments`` are updated in place."""
        ...

    def loss_and_grad(self, at: Vector, batch: Mapping[str, Any]) -> tuple[float, Vector]:
        """Return the mean token loss of one batch at ``at``, and its gradient."""
        ...


class Method(ABC):
    """The rules of one method. A subclass fills in what it does; inheritance ends there.

    Args:
        options: the method's own options of the recipe.
        setup: layout, number of clients, seed, training options.

    Attributes:
        fits: how many local trainings of T steps one turn is.
    """

    fits: ClassVar[int] = 1

    def __init__(self, options: Any, setup: Setup) -> None:
        self.options = options
        self.setup = setup

    def init_server(self, start: Vector) -> ServerState:
        """Return the server before the first round; ``start`` is the untouched adapter."""
        return ServerState({"global_weights": start.clone()})

    def init_client(self, info: ClientInfo, start: Vector) -> ClientState:
        """Return a client before its first turn; it keeps what it would be scored with."""
        return ClientState({"weights": start.clone()})

    def broadcast(self, server: ServerState, client_id: str) -> Broadcast:
        """Return what this client gets to see."""
        return Broadcast({"global_weights": server.vectors["global_weights"]})

    @abstractmethod
    def turn(
        self, sent: Broadcast, client: ClientState, run: LocalRun
    ) -> tuple[Upload, ClientState]:
        """Train on the client's machine; return what leaves it and what it keeps.

        ``sent`` and ``client`` are left alone.
        """

    @abstractmethod
    def aggregate(self, server: ServerState, uploads: Sequence[Upload], round: int) -> ServerState:
        """Return the server after a round; ``uploads`` come in client-id order."""

    @abstractmethod
    def candidates(self, sent: Broadcast, client: ClientState) -> Mapping[str, Vector]:
        """Return the models that could be this client's, by name, the method's own choice first."""

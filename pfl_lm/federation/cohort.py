"""Who takes part in a round.

    can be reached   everybody, or those whom the trace has in this round
    how many         `clients_per_round`, or `fraction_train` of those who can be reached, halves
                     up; at least one and no more than there are
    drawn            without replacement. `uniform`: every cohort is as likely as any other;
                     `examples`: one client after another, each time with probability
                     n_i / Σ n_k over those not drawn yet (successive sampling)

A draw follows from the seed, the round, who can be reached and the options, and from nothing that
came before. It is made of whole numbers alone, so that it is the same on every machine.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pfl_lm.errors import RecipeError
from pfl_lm.federation.availability import Trace, read_trace
from pfl_lm.recipe import Recipe
from pfl_lm.recipe.sections import FederationOptions
from pfl_lm.seeds import derive_seed


def cohort(
    options: FederationOptions,
    n_train: Mapping[str, int],
    trace: Trace | None,
    *,
    seed: int,
    round: int,
) -> list[str]:
    """Return this round's clients, in id order.

    Args:
        options: how many, and how they are drawn; ``options.seed`` is not looked at.
        n_train: every client's train rows, at least 1.
        trace: who can be reached when; None for everybody, always. Clients that it names and
            ``n_train`` does not have left the run.
        seed: the seed of the run's cohorts.
        round: from 1.
    """
    reached = sorted(n_train if trace is None else n_train.keys() & trace.clients(round))
    size = options.cohort_size(len(reached))
    if size == len(reached):
        return reached
    draw = random.Random(derive_seed(seed, "cohort", round))
    if options.sampling == "examples":
        return sorted(_by_examples(reached, n_train, size, draw))
    return sorted(draw.sample(reached, size))


def _by_examples(
    reached: Sequence[str], n_train: Mapping[str, int], size: int, draw: random.Random
) -> set[str]:
    """Draw one client after another, each by its rows among those not drawn yet.

    One that comes again is passed over, which is to draw among the others. Once half of the rows
    are taken the drawn are left out, so that few come again.
    """
    left, chosen = list(reached), set[str]()
    while len(chosen) < size:
        left = [client for client in left if client not in chosen]
        up_to = list(accumulate(n_train[client] for client in left))
        taken = 0
        while len(chosen) < size and 2 * taken < up_to[-1]:
            client = left[bisect_right(up_to, draw.randrange(up_to[-1]))]
            if client not in chosen:
                chosen.add(client)
                taken += n_train[client]
    return chosen


@dataclass(frozen=True, slots=True)
class Cohorts:
    """The cohorts of one run, each drawn when it is asked for."""

    options: FederationOptions
    n_train: Mapping[str, int]
    trace: Trace | None
    seed: int

    @classmethod
    def of(cls, recipe: Recipe, n_train: Mapping[str, int]) -> Cohorts:
        """Return the cohorts of a recipe among clients with so many train rows; read its trace.

        Whom the trace names was checked before the run began; who has left it since may be there.

        Raises:
            DataError: the trace cannot be used.
        """
        options = recipe.federation
        trace = None if options.availability is None else read_trace(options.availability, None)
        seed = recipe.seed if options.seed is None else options.seed
        return cls(options, n_train, trace, seed)

    def __call__(self, round: int, members: Collection[str] | None = None) -> list[str]:
        """Return the clients of a round, from 1, in id order; of these members, or of all."""
        n_train = self.n_train
        if members is not None:
            n_train = {client: n_train[client] for client in members}
        return cohort(self.options, n_train, self.trace, seed=self.seed, round=round)

    def all(self) -> list[list[str]]:
        """Return the clients of every round of the run."""
        return [self(round) for round in range(1, self.options.rounds + 1)]


def refuse_small_rounds(options: FederationOptions, n_clients: int, trace: Trace | None) -> None:
    """Check that among so many clients every round of a run can have those it needs.

    Raises:
        RecipeError: there are fewer clients than a round is to have, or than it needs.
    """
    key = "federation.clients_per_round"
    if options.clients_per_round is not None and options.clients_per_round > n_clients:
        there = "there is 1 client" if n_clients == 1 else f"there are {n_clients} clients"
        raise RecipeError(
            f"{key}: must be at most the number of clients, got {options.clients_per_round} and "
            f"{there}",
            hint=f"{key}={n_clients} is everybody",
        )
    last = 1 if trace is None else min(options.rounds, len(trace.rounds))
    for round in range(1, last + 1):
        reached = n_clients if trace is None else len(trace.clients(round))
        size = options.cohort_size(reached)
        if size < options.min_clients:
            raise _too_small(options, round, size, reached, traced=trace is not None)


def _too_small(
    options: FederationOptions, round: int, size: int, reached: int, *, traced: bool
) -> RecipeError:
    what = "that can be reached then" if traced else "that there are"
    advice = ["lower federation.min_clients"]
    if size < reached:
        advice.append(f"raise federation.fraction_train ({options.fraction_train})")
    elif traced:
        advice.append(f"name more clients of round {round} in {options.availability}")
    return RecipeError(
        f"federation.min_clients: round {round} would have {size} of the {reached} {what}, and "
        f"needs {options.min_clients}",
        hint=", or ".join(advice),
    )

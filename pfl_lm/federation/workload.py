"""How much a run still has to do, so that a display can say how long it takes."""

from __future__ import annotations

from collections.abc import Mapping

from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.cohort import Cohorts
from pfl_lm.federation.history import History
from pfl_lm.federation.watch import Workload
from pfl_lm.methods import ServerState


def workload(
    cohorts: Cohorts, side: ClientSide, steps: Mapping[str, int], server: ServerState, past: History
) -> Workload:
    """Count the optimizer steps and the rows to score that ``past`` does not hold yet.

    ``server`` is any state of the server: only the names of its candidates matter.
    """
    rounds, members = cohorts.options.rounds, past.members()
    done = past.last_round()
    first = -1 if done is None else done

    left = 0
    for round in range(first + 1, rounds + 1):
        if past.cohort(round) is not None:
            chosen = past.waiting(round)
        else:
            ids = [member.client for member in members if member.joined < round]
            chosen = cohorts(round, ids) if round else []
        left += side.method.fits * sum(steps[client] for client in chosen)

    dataset = side.dataset
    everyone = dataset.client_ids
    candidates = len(side.candidates(everyone[0], side.method.broadcast(server, everyone[0]), None))
    known = 1 if done is None else 0  # what the untouched backbone has on validation, from round 0
    rows = 0
    for round in range(max(first, 0), rounds + 1):
        final = round == rounds
        scored = past.chosen(round) if final else past.scored(round)
        for client in (c for c in everyone if c not in scored):
            validation = len(dataset.validation(client))
            rows += (candidates - known) * validation if final else validation
            rows += candidates * len(dataset[client].test_rows) if final else 0
    return Workload(rounds=rounds, clients=len(everyone), steps=left, rows=rows, done=done)

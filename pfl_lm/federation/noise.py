"""The secret of a run that all its noise comes from.

A recipe's seed is known to whoever reads a card, and known noise protects nothing. So a run with a
privacy lever draws a secret of its own and keeps it in its ledger, which is never pushed: a turn or
round that is done again after an interruption has the same noise, and has spent nothing twice. Who
can read the run folder can take the noise off again.
"""

from __future__ import annotations

import secrets

from pfl_lm.errors import RunFolderError
from pfl_lm.federation.ledger import Ledger
from pfl_lm.seeds import derive_seed

_KEY = "noise_seed"
_BITS = 128


def noise_seed(ledger: Ledger) -> int:
    """Return the secret of this run; the first call draws and commits it.

    Raises:
        RunFolderError: what the ledger holds is not one, or the ledger cannot be written.
    """
    known = ledger.about().get(_KEY)
    if known is None:
        known = str(secrets.randbits(_BITS))
        ledger.note(_KEY, known)
    usable = known.isascii() and known.isdigit() and len(known) < 50
    if not usable:  # it is not shown: it may be most of the secret
        raise RunFolderError(f"{ledger.path}: the noise_seed of this run is not a number")
    return int(known)


def client_noise(secret: int, client: str, round: int) -> int:
    """Return the seed of one client's noise and row sampling in one round."""
    return derive_seed(secret, "client noise", client, round)

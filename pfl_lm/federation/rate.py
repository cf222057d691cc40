"""``learning_rate: auto`` in a federation: whom to ask for a rate, and when to give up.

A few clients are asked at the untouched start (train/rate.py); the median is tried. If over the
first round the loss of any client's own batches rises, the run starts again with half the rate.
"""

from __future__ import annotations

from pfl_lm.errors import DivergedError
from pfl_lm.federation.client import ClientSide
from pfl_lm.recipe import PFLAlignOptions, Recipe, TrainingOptions
from pfl_lm.seeds import derive_seed
from pfl_lm.train.rate import PROBED_CLIENTS, median_rate, suggested_rate

MOST_HALVINGS = 10


def first_rate(recipe: Recipe, side: ClientSide) -> float:
    """Return the rate to try first. Overwrites the resident adapter, commits nothing.

    Raises:
        DivergedError: no client has a finite gradient that is not zero.
    """
    assert isinstance(recipe.method, PFLAlignOptions)
    rates = []
    for client in side.dataset.client_ids[:PROBED_CLIENTS]:
        steps = side.training_of(client).steps_for(side.dataset.n_train(client))
        run = side.local_run(client, steps, derive_seed(recipe.seed, "turn", client, 1))
        method = recipe.method
        rates.append(suggested_rate(run, side.start, beta=method.beta, eps=method.eps))
    rate = median_rate(rates)
    if rate is None:
        raise DivergedError(
            "learning_rate: auto found no finite gradient to go by",
            hint="give training.learning_rate a number",
        )
    return rate


def with_training(recipe: Recipe, training: TrainingOptions) -> Recipe:
    """Return the recipe with other training options, such as a number in place of ``auto``."""
    return recipe.model_copy(update={"training": training})


def no_rate(last: float) -> DivergedError:
    """Return the error that says that halving did not help."""
    return DivergedError(
        f"learning_rate: auto found no rate, down to {last:g}, at which every client learns",
        hint="give training.learning_rate a number, and see that the data are right",
    )

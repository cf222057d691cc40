"""What one client goes by, once ``clients``' rules are filled in; torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pfl_lm.recipe.clients import OF_THE_ADAPTER, ClientRule
from pfl_lm.recipe.sections import AdapterOptions, TrainingOptions


@dataclass(frozen=True, slots=True)
class Own:
    """What one client goes by: the recipe's sections with its rules' changes in them.

    ``adapter.lora_alpha`` is such that its scale lora_alpha / r is the recipe's.
    """

    training: TrainingOptions
    adapter: AdapterOptions
    max_length: int

    def differences(self, other: Own) -> str:
        """Return in what it differs from another, in words; nothing if it does not."""
        modules = sorted(self.adapter.target_modules)
        said = (
            (self.training.length, other.training.length),
            (_rate(self), _rate(other)),
            (f"max_length {self.max_length}", f"max_length {other.max_length}"),
            (f"r {self.adapter.r}", f"r {other.adapter.r}"),
            (f"on {', '.join(modules)}", f"on {', '.join(sorted(other.adapter.target_modules))}"),
        )
        return ", ".join(one for one, two in said if one != two)


def _rate(own: Own) -> str:
    return f"learning rate {own.training.learning_rate}"


def own_of(
    rules: Iterable[ClientRule],
    training: TrainingOptions,
    adapter: AdapterOptions,
    max_length: int,
    client: str,
    n_rows: int,
) -> Own:
    """Return what a client with so many train rows goes by."""
    changes: dict[str, object] = {}
    for rule in rules:
        if rule.match.holds(client, n_rows):
            changes |= rule.changes()
    of_training = {k: v for k, v in changes.items() if k in TrainingOptions.model_fields}
    of_adapter = {k: v for k, v in changes.items() if k in OF_THE_ADAPTER}
    length = changes.get("max_length", max_length)
    assert isinstance(length, int)
    return Own(
        training.model_copy(update=of_training) if of_training else training,
        _shaped(adapter, of_adapter),
        length,
    )


def largest_adapter(rules: Iterable[ClientRule], adapter: AdapterOptions) -> AdapterOptions:
    """Return the adapter that has room for every client's: the largest r, all the modules.

    It follows from the recipe alone, so that it is the same whoever comes or goes.
    """
    rules = list(rules)
    r = max(adapter.r, *(rule.r or 0 for rule in rules)) if rules else adapter.r
    modules = dict.fromkeys(adapter.target_modules)
    for rule in rules:
        modules |= dict.fromkeys(rule.target_modules or ())
    return _shaped(adapter, {"r": r, "target_modules": list(modules)})


def _shaped(adapter: AdapterOptions, changes: Mapping[str, object]) -> AdapterOptions:
    """Return an adapter with another r or other modules, and the same scale."""
    changed = {key: value for key, value in changes.items() if getattr(adapter, key) != value}
    if not changed:
        return adapter
    r = changed.get("r", adapter.r)
    assert isinstance(r, int)
    alpha = adapter.lora_alpha if r == adapter.r else adapter.lora_alpha * r / adapter.r
    alpha = int(alpha) if float(alpha).is_integer() else alpha
    return adapter.model_copy(update={**changed, "lora_alpha": alpha})

"""What is said of a method's name and of its options."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfl_lm.errors import RecipeError
from pfl_lm.recipe.methods import METHOD_OPTIONS
from tests.recipe.minimal import HEAD, load

NAMES = ", ".join(METHOD_OPTIONS)
AVERAGING = (
    "pflalign, fedavg, fedprox, fedavgm, fedadam, ditto, ffa_lora, fedsa_lora, rolora, flexlora "
    "and hetlora"
)
METHODS = [
    (
        "{}",
        f"method.name: missing. Add one of {NAMES}, for example `name: pflalign`",
    ),
    (
        "{name: pflalgin}",
        f"method.name: must be one of {NAMES}, got 'pflalgin'. Did you mean `pflalign`?",
    ),
    ("{name: 3}", f"method.name: must be one of {NAMES}, got 3"),
    ("{name: fedavg, beta: 0.3}", "method.beta: `beta` is an option of pflalign, not of fedavg"),
    ("{name: pflalign, mu: 0.3}", "method.mu: `mu` is an option of fedprox, not of pflalign"),
    (
        "{name: local, weighting: uniform}",
        f"method.weighting: `weighting` is an option of {AVERAGING}, not of local",
    ),
    (
        "{name: fedprx}",
        f"method.name: must be one of {NAMES}, got 'fedprx'. Did you mean `fedprox`",
    ),
    (
        "{name: fedprox, proximal_mu: 0.1}",
        "method.proximal_mu: unknown key. Did you mean `method.mu`?",
    ),
    ("{name: fedprox, mu: -1}", "method.mu: must be a number of at least 0, got -1"),
    (
        "{name: fedavgm, server_momentum: 1}",
        "method.server_momentum: must be a number of at least 0 and less than 1, got 1",
    ),
    (
        "{name: fedavgm, server_lr: 1}",
        "method.server_lr: unknown key. Did you mean `method.server_learning_rate`?",
    ),
    (
        "{name: fedavg, server_learning_rate: 1}",
        "method.server_learning_rate: `server_learning_rate` is an option of fedavgm, fedadam and "
        "scaffold, not of fedavg",
    ),
    ("{name: fedadam, tau: 0}", "method.tau: must be a number greater than 0, got 0"),
    ("{name: fedadam, beta1: 0.9}", "method.beta1: unknown key. Did you mean `method.beta_1`?"),
    (
        "{name: fedadam, server_momentum: 0.9}",
        "method.server_momentum: `server_momentum` is an option of fedavgm, not of fedadam",
    ),
    (
        "{name: scaffold, weighting: examples}",
        f"method.weighting: `weighting` is an option of {AVERAGING}, not of scaffold",
    ),
    ("{name: scafold}", f"method.name: must be one of {NAMES}, got 'scafold'. Did you mean `scaff"),
    ("{name: ditto, lam: -1}", "method.lam: must be a number of at least 0, got -1"),
    ("{name: ditto, lambda: 0.1}", "method.lambda: unknown key. Did you mean `method.lam`?"),
    ("{name: fedprox, lam: 0.1}", "method.lam: `lam` is an option of ditto, not of fedprox"),
    ("{name: FFA-LoRA}", f"method.name: must be one of {NAMES}, got 'FFA-LoRA'. Did you mean `ff"),
    ("{name: FedSA-LoRA}", f"method.name: must be one of {NAMES}, got 'FedSA-LoRA'. Did you mean"),
    ("{name: rolora, mu: 0.1}", "method.mu: `mu` is an option of fedprox, not of rolora"),
    ("{name: ffa_lora, beta: 0.1}", "method.beta: `beta` is an option of pflalign, not of ffa_lo"),
    ("{name: fedsa_lora, lam: 1}", "method.lam: `lam` is an option of ditto, not of fedsa_lora"),
    ("{name: local, bta: 0.3}", "method.bta: unknown key. Did you mean `method.beta`?"),
    ("{name: pflalign, bta: 0.3}", "method.bta: unknown key. Did you mean `method.beta`?"),
    (
        "{name: pflalign, beta: 1}",
        "method.beta: must be a number greater than 0 and less than 1, got 1",
    ),
    ("{name: pflalign, eps: -1}", "method.eps: must be a number of at least 0, got -1"),
    (
        "{name: pflalign, correction: erv}",
        "method.correction: must be one of erf, none, half, full, hard, got 'erv'. "
        "Did you mean `erf`?",
    ),
    (
        "{name: pflalign, preconditioner: yes}",
        "method.preconditioner: expected true or false, got 'yes'",
    ),
    (
        "{name: pflalign, personalized_start: false}",
        "method.personalized_start: false needs `method.correction: none`, "
        "otherwise every round would move the global adapter by -Γ⊙Δ",
    ),
]


@pytest.mark.parametrize(("method", "message"), METHODS)
def test_methods(tmp_path: Path, method: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text=f"{HEAD}method: {method}\n")

    _, line = caught.value.message.splitlines()
    assert line.startswith(f"  line 6  {message}")

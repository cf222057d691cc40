"""What is said of values that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfl_lm.errors import RecipeError
from tests.recipe.minimal import load

RULES = [
    (
        ["training={learning_rate: 1.0}"],
        "needs exactly one of `max_steps` and `local_epochs`; neither is given",
    ),
    (
        ["training.local_epochs=2"],
        "training: needs exactly one of `max_steps` and `local_epochs`; both are given",
    ),
    (
        ["method.name=fedavg", "training.learning_rate=auto"],
        "auto is for pflalign's preconditioned gradient (`precondition_target: gradient`, "
        "`update_scale: none`); here give a number, for AdamW for example 0.002",
    ),
    (
        ["method.name=scaffold", "training.optimizer=adamw"],
        "override training.optimizer=adamw: scaffold takes (w_g − w) / (T η) for a mean of "
        "gradients, which it is with plain SGD only; write `sgd`, or leave it out",
    ),
    (
        ["method.name=scaffold", "training.learning_rate=auto"],
        "auto is for pflalign's preconditioned gradient",
    ),
    (
        ["federation.clients_per_round=2", "federation.fraction_train=1.0"],
        "federation: needs exactly one of `fraction_train` and `clients_per_round`; both are given",
    ),
    (
        ["federation.fraction_train=null"],
        "needs exactly one of `fraction_train` and `clients_per_round`; neither is given",
    ),
    (
        ["federation.clients_per_round=2", "federation.min_clients=3"],
        "must be at most `clients_per_round` (2), or round 1 has too few already; got 3",
    ),
    (
        ["federation.clients_per_round=0"],
        "must be a whole number from 1 to 1000000, got 0",
    ),
    (["federation.min_clients=0"], "must be a whole number from 1 to 1000000, got 0"),
    (
        ["federation.fraction_train=0"],
        "must be a number greater than 0 and at most 1, got 0",
    ),
    (
        ["federation.seed=-1"],
        "must be a whole number from 0 to 9223372036854775807, got -1",
    ),
    (
        ["federation.sampling=example"],
        "must be one of uniform, examples, got 'example'. Did you mean `examples`?",
    ),
    (["federation.availability=''"], "must not be empty"),
    (["federation.trace=x.csv"], "unknown key. Did you mean `federation.availability`?"),
    (["federation.cohort_size=3"], "unknown key. Did you mean `federation.clients_per_round`?"),
    (["federation.min_available_nodes=3"], "unknown key. Did you mean `federation.min_clients`?"),
    (["training.learning_rate=often"], "expected a number, got 'often'"),
    (
        ["method.preset=sgd", "method.correction=half"],
        "`preset: sgd` sets it to 'none'",
    ),
    (
        ["method.preset=sgd", "method.offset_reference=post"],
        "post starts each client where it ended, which `personalized_start: false` forbids",
    ),
    (
        ["method.stale_offset=decay", "method.offset_reference=post"],
        "decay shrinks a kept offset, and with `offset_reference: post` none is kept: a client "
        "starts where it ended, however long ago",
    ),
    (
        ["method.stale_offset=decay", "method.preset=no_correction"],
        "decay goes by the share Γ that corrections take off the offset, and `correction: none` "
        "takes none: nothing would ever decay",
    ),
    (["method.stale_offset=decay", "method.preset=sgd"], "nothing would ever decay"),
    (
        ["method.name=fedavg", "method.stale_offset=decay"],
        "`stale_offset` is an option of pflalign, not of fedavg",
    ),
    (["method.preset=papper"], "hard_correction, no_realignment, sgd, got 'papper'"),
    (
        ["backbone.bnb_4bit_use_double_quant=true"],
        "override backbone.bnb_4bit_use_double_quant=true: goes with `quantization: nf4` only, not "
        "with `none`; leave it out",
    ),
    (
        ["backbone.quantization=int8", "backbone.bnb_4bit_compute_dtype=bfloat16"],
        "override backbone.bnb_4bit_compute_dtype=bfloat16: goes with `quantization: nf4` only, "
        "not with `int8`; leave it out",
    ),
    (
        ["backbone.quantization=nf5"],
        "must be one of none, nf4, int8, got 'nf5'. Did you mean `nf4`?",
    ),
    (["backbone.load_in_4bit=true"], "unknown key. Did you mean `backbone.quantization`?"),
    (["backbone.device_map=balanced"], "must be one of auto, got 'balanced'"),
    (
        ["backbone.device_map=auto", "runtime.parallel=clients"],
        "override backbone.device_map=auto: auto spreads one backbone over all GPUs, and "
        "`runtime.parallel: clients` wants one for each process; leave one of them out",
    ),
    (
        ["backbone.device_map=auto", "runtime.compile=true"],
        "override runtime.compile=true: with `backbone.device_map` the layers are called through "
        "Accelerate, which moves what they are given, and are not compiled; leave it out",
    ),
    (
        ["training.gradient_checkpointing=true", "runtime.compile=true"],
        "override runtime.compile=true: a compiled layer cannot be run once more with the same "
        "dropout, as `training.gradient_checkpointing` needs it; leave one of them out",
    ),
    (
        ["runtime.parallel=both"],
        "must be one of auto, clients, data, got 'both'",
    ),
]


@pytest.mark.parametrize(("overrides", "said"), RULES)
def test_rules_of_the_later_switches(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, *overrides)
    assert said in caught.value.message


def test_adamw_is_refused_where_it_undoes_the_method(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "training.optimizer=adamw")

    assert caught.value.message.splitlines()[1] == (
        "  override training.optimizer=adamw: AdamW normalises a per-coordinate factor on the "
        "gradient away, so pflalign's preconditioner would do nothing; set "
        "`method.precondition_target: update` or `training.optimizer: sgd`"
    )

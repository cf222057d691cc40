"""What is saved by not computing what is not needed, or not twice, while rows are scored.

    python -m tests.benchmarks.scoring [--tiny] [--repeats N]

The scoring of eight rows of the quickstart's first client. `all logits` is the plain model with a
loss over every position, masked; `head` computes logits only where a token is supervised; `trunk`
also starts from remembered states below the lowest layer with an adapter (`runtime.trunk_cache`).
What they save while training, `pfl-lm bench` says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pfl_lm.data.batches import collate
from pfl_lm.data.federated import FederatedDataset
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import load_backbone
from pfl_lm.model.states import TrunkStates
from pfl_lm.preflight import preflight
from pfl_lm.recipe import load_recipe
from pfl_lm.train.loss import nll_sum
from tests.benchmarks.measure import alternate, arguments, show, table
from tests.benchmarks.world import QUICKSTART
from tests.tiny import tiny_recipe


def all_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    wanted = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=-100, reduction="sum")


def main() -> None:
    given = arguments(__doc__, repeats=7)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        top = {"adapter.layers_to_transform": [1]}
        loaded = load_recipe(tiny_recipe(Path(folder), **top) if given.tiny else QUICKSTART)
        options, rows = loaded.recipe, preflight(loaded, to_run=False)
    backbone = load_backbone(options.backbone, torch.device("cpu"))
    adapter = Adapter(backbone, options.adapter, seed=0, trunk=TrunkStates())
    clients = FederatedDataset.build(rows, backbone.tokenizer, options.data.max_length)
    eight = collate(clients.train(clients.client_ids[0])[:8], backbone.pad_token_id)
    losses: dict[str, float] = {}

    def score(way: str, loss: Callable[[], Tensor]) -> Callable[[], None]:
        def do() -> None:
            with torch.no_grad():
                losses[way] = float(loss())

        return do

    ways = {
        "all logits": lambda: all_logits(adapter.model, eight),
        "head": lambda: nll_sum(adapter.model, eight),
        "head and trunk": lambda: nll_sum(adapter.forward, eight),
    }
    times = alternate({way: score(way, loss) for way, loss in ways.items()}, given.repeats)
    supervised, tokens = len(eight["positions"]), int(eight["attention_mask"].sum())
    numbers = {name: each.numbers for name, each in times.items()}
    plain = numbers["all logits"]["cpu_median"]
    ratios = {name: plain / each["cpu_median"] for name, each in numbers.items()}
    show(
        f"scoring 8 rows, {tokens} tokens of which {supervised} are supervised",
        table(times),
        {"losses": losses, "ms": numbers, "times_as_fast": ratios},
    )
    said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    print(f"  times as fast as all logits, by cpu medians: {said}")


if __name__ == "__main__":
    main()

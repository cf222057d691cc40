"""What is saved by not computing what is not needed, or not twice: step and score, side by side.

    python -m tests.benchmarks.savings [--tiny] [--repeats N]

On rows of the quickstart's first client: a step (forward, loss, backward) on a batch of four, and
the scoring of eight. `all logits` is the plain model with a loss over every position, masked;
`head` computes logits only where a token is supervised; `trunk` also starts from remembered states
below the lowest layer with an adapter (`runtime.trunk_cache`).
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
from pfl_lm.model.trunk import TrunkStates
from pfl_lm.preflight import preflight
from pfl_lm.recipe import load_recipe
from pfl_lm.train.loss import nll_sum
from tests.benchmarks.measure import alternate, arguments, show, table
from tests.benchmarks.world import QUICKSTART
from tests.tiny import tiny_recipe

WAYS = ("all logits", "head", "head and trunk")


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
        options, rows = loaded.recipe, preflight(loaded)
    backbone = load_backbone(options.backbone, torch.device("cpu"))
    adapter = Adapter(backbone, options.adapter, seed=0, trunk=TrunkStates())
    clients = FederatedDataset.build(rows, backbone.tokenizer, options.data.max_length)
    examples = clients.train(clients.client_ids[0])
    four, eight = (collate(examples[:n], backbone.pad_token_id) for n in (4, 8))
    losses: dict[str, float] = {}

    def step(way: str, loss: Callable[[], Tensor]) -> Callable[[], None]:
        def do() -> None:
            adapter.zero_grad()
            nll = loss()
            nll.backward()  # type: ignore[no-untyped-call]
            losses[way] = float(nll.detach())

        return do

    def score(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def do() -> None:
            with torch.no_grad():
                loss()

        return do

    def ways(batch: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
        return {
            "all logits": lambda: all_logits(adapter.model, batch),
            "head": lambda: nll_sum(adapter.model, batch),
            "head and trunk": lambda: nll_sum(adapter.forward, batch),
        }

    work = {f"step, {way}": step(way, loss) for way, loss in ways(four).items()}
    work |= {f"score, {way}": score(loss) for way, loss in ways(eight).items()}
    times = alternate(work, given.repeats)
    supervised, tokens = len(four["positions"]), int(four["attention_mask"].sum())
    show(
        f"a step of 4 rows, {tokens} tokens of which {supervised} are supervised; scoring 8 rows",
        table(times),
        {"losses": losses, "ms": {name: each.numbers for name, each in times.items()}},
    )
    for what in ("step", "score"):
        plain, *saved = (times[f"{what}, {way}"].numbers["cpu_median"] for way in WAYS)
        ratios = ", ".join(
            f"{way} {plain / each:.2f}" for way, each in zip(WAYS[1:], saved, strict=True)
        )
        print(f"  {what}: times as fast as all logits, by cpu medians: {ratios}")


if __name__ == "__main__":
    main()

"""A head of one's own: trained, chosen with and exported, and in nothing that leaves a client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pfl_lm.finetune
from pfl_lm.federation.fleet.serial import SerialFleet
from pfl_lm.federation.messages import Assignment, Update
from pfl_lm.federation.own_head import NAME
from pfl_lm.federation.watch import Watch
from pfl_lm.finetune import RunResult, finetune
from pfl_lm.layout import AdapterLayout, Vector
from pfl_lm.methods import METHODS
from pfl_lm.model.adapter import Adapter
from pfl_lm.recipe import AdapterOptions, TrainingOptions, load_recipe
from pfl_lm.recipe.methods import MIXES_RANKS
from pfl_lm.train import LocalTrainer
from tests.runs import ask
from tests.tasks.test_classification import backbone_of, batch_of
from tests.tasks.worlds import OF_CLIENT, classification, labelled_rows
from tests.tiny import write_jsonl

PRIVATE = {"adapter.head": "private"}


def run(folder: Path, watch: Watch | None = None, **changes: Any) -> RunResult:
    return finetune(load_recipe(classification(folder, **changes)), watch)


def exported(result: RunResult) -> dict[str, dict[str, torch.Tensor]]:
    return {
        c.client: load_file(result.folder / "adapters" / c.slug / "adapter_model.safetensors")
        for c in result.clients
    }


def states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return each client's private state after its last turn."""
    last = ask(folder, "SELECT client, state_path, max(round) FROM turns GROUP BY client")
    return {client: load_file(folder / path) for client, path, _ in last}


class Recorded(SerialFleet):
    """A fleet that notes what was sent, what came back, and the layout of both."""

    seen: list[tuple[Assignment, Update]]
    layout: AdapterLayout

    def run(self, tasks: Iterable[Assignment]) -> Iterator[Update]:
        type(self).layout = self.side.adapter.layout
        for task in tasks:
            for update in super().run([task]):
                type(self).seen.append((task, update))
                yield update


def head_of(layout: AdapterLayout, name: str, vector: Vector) -> Vector:
    """Return a head's numbers in a whole vector, or in all B factors, of which they are last."""
    n = layout.head.stop - layout.head.start
    return vector[:0] if name == "A" else vector[len(vector) - n :]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - MIXES_RANKS | {"local"}))
def test_nothing_of_a_head_leaves_by_any_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """What an upload holds at the head's place is what was sent, bit for bit, in every round."""
    monkeypatch.setattr(Recorded, "seen", [], raising=False)
    monkeypatch.setattr(pfl_lm.finetune, "SerialFleet", Recorded)
    changes = {"federation.rounds": 3, "method.name": method}
    if method in ("scaffold", "pflalign"):
        changes |= {"training.optimizer": "sgd", "training.learning_rate": 0.2}
    result = run(tmp_path, **PRIVATE, **changes)

    layout = Recorded.layout
    trained = [(task, update) for task, update in Recorded.seen if task.kind == "train"]
    assert len(trained) == 9
    compared = 0
    for task, update in trained:
        assert update.upload is not None
        for name, vector in update.upload.vectors.items():
            sent = task.sent.vectors[f"global_{name}"]
            there = head_of(layout, name, vector)
            assert torch.equal(there, head_of(layout, name, sent))
            assert not there.any()
            compared += len(there)
    sends_none = method in ("local", "fedsa_lora")
    assert (compared == 0) == sends_none

    heads = {client: state.pop(NAME) for client, state in states(result.folder).items()}
    assert all(head.any() for head in heads.values())
    assert not torch.equal(heads["alice"], heads["bob"])
    for state in states(result.folder).values():  # nor in what the method itself has kept
        whole = {name: v for name, v in state.items() if len(v) == layout.d and name != NAME}
        assert not whole["weights"][layout.head].any()
    [(path,)] = ask(result.folder, "SELECT state_path FROM rounds WHERE round = 3")
    for name, vector in load_file(result.folder / path).items():
        there = head_of(layout, name.removeprefix("global_"), vector)
        assert len(there.unique()) <= 1  # fedadam's second moment decays from its start
        assert not there.any() or name == "second_moment"
    assert not (result.folder / "global").exists()


def test_a_clients_model_has_its_own_head(tmp_path: Path) -> None:
    result = run(tmp_path, **PRIVATE)
    heads = {client: state[NAME] for client, state in states(result.folder).items()}
    found = exported(result)
    for client in result.clients:
        tensors = found[client.client]
        head = torch.cat(
            [
                tensors[f"base_model.model.classifier.{part}"].flatten()
                for part in ("weight", "bias")
            ]
        )
        kept = torch.zeros_like(head) if client.choice.candidate == "base" else heads[client.client]
        assert torch.equal(head, kept.roll(0)) or torch.equal(
            head.sort().values, kept.sort().values
        )
    assert any(client.choice.candidate != "base" for client in result.clients)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_of_clients_that_share_nothing_it_makes_no_difference(
    tmp_path: Path, optimizer: str
) -> None:
    """`local` with a head of its own is `local`, to the bit: dropout, batches and moments too."""
    changes = {"method.name": "local", "training.optimizer": optimizer, "federation.rounds": 3}
    shared = run(tmp_path / "shared", **changes)
    private = run(tmp_path / "private", **PRIVATE, **changes)
    assert [c.sha256 for c in shared.clients] == [c.sha256 for c in private.clients]
    assert [c.scores for c in shared.clients] == [c.scores for c in private.clients]


def test_of_one_client_it_makes_no_difference(tmp_path: Path) -> None:
    rows = str(write_jsonl(tmp_path / "alice.jsonl", labelled_rows(("alice",))))
    changes = {"data.path": rows, "federation.rounds": 3}
    shared = run(tmp_path / "shared", **changes)
    private = run(tmp_path / "private", **PRIVATE, **changes)
    assert [c.sha256 for c in shared.clients] == [c.sha256 for c in private.clients]


def test_of_several_clients_it_makes_one(tmp_path: Path) -> None:
    """Without this, the tests above would hold of a head that is private anyhow, or never."""
    shared, private = run(tmp_path / "shared"), run(tmp_path / "private", **PRIVATE)
    assert [c.scores for c in shared.clients] != [c.scores for c in private.clients]


def test_another_clients_labels_change_no_bit_before_anything_is_averaged(tmp_path: Path) -> None:
    turned = {"fruit": "stone", "stone": "music", "music": "fruit"}
    other = [
        {**row, "label": turned[row["label"]]} if row["client"] == "bob" else row
        for row in labelled_rows()
    ]
    changes = {"federation.rounds": 1, "data.labels": sorted(OF_CLIENT.values()), **PRIVATE}
    path = str(write_jsonl(tmp_path / "other.jsonl", other))
    first = states(run(tmp_path / "first", **changes).folder)
    second = states(run(tmp_path / "second", **changes, **{"data.path": path}).folder)
    for client in ("alice", "carol"):
        assert torch.equal(first[client][NAME], second[client][NAME])
        assert torch.equal(first[client]["weights"], second[client]["weights"])
    assert not torch.equal(first["bob"][NAME], second["bob"][NAME])


@pytest.mark.parametrize("method", ["fedprox", "ditto"])
def test_a_pull_towards_what_is_shared_leaves_a_private_head_alone(
    tmp_path: Path, method: str
) -> None:
    """However strong it is: it would be a pull towards zero."""
    strength = {"fedprox": "method.mu", "ditto": "method.lam"}[method]
    changes = {"method.name": method, "training.optimizer": "sgd", "federation.rounds": 1}
    weak = run(tmp_path / "weak", **PRIVATE, **changes, **{strength: 0.0})
    strong = run(tmp_path / "strong", **PRIVATE, **changes, **{strength: 20.0})
    one, other = states(weak.folder), states(strong.folder)
    for client in one:
        ratio = other[client][NAME].norm() / one[client][NAME].norm()
        assert 0.9 < float(ratio) < 1.1


class _Stop(Watch):
    def turn(self, update: Update) -> None:
        if (update.round, update.client) == (2, "alice"):
            raise KeyboardInterrupt


@pytest.mark.parametrize("head", ["shared", "private"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, head: str) -> None:
    changes = {"adapter.head": head, "federation.rounds": 3}
    whole = run(tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves", _Stop(), **changes)
    recipe = load_recipe(tmp_path / "halves" / "recipe.yaml")
    halves = finetune(recipe, resume=True)
    assert [c.sha256 for c in whole.clients] == [c.sha256 for c in halves.clients]
    written = [(r.folder / "metrics.csv").read_text() for r in (whole, halves)]
    assert written[0] == written[1]


def test_an_automatic_rate_looks_at_the_head_that_was_there(tmp_path: Path) -> None:
    """The loss before a turn is that of the head before it: ln 3 in round 1, never the new one."""
    changes = {
        "method.name": "pflalign",
        "training.optimizer": "sgd",
        "training.learning_rate": "auto",
        "federation.rounds": 1,
    }
    result = run(tmp_path, **PRIVATE, **changes)
    summaries = ask(result.folder, "SELECT json_extract(summary, '$.batches_before') FROM turns")
    assert [before for (before,) in summaries] == [pytest.approx(1.0986123, abs=1e-6)] * 3


def test_a_gradient_that_a_method_asks_for_has_nothing_of_a_private_head() -> None:
    backbone = backbone_of("bert")
    adapter = Adapter(backbone, AdapterOptions(), seed=1)
    batch = {**batch_of(backbone, labelled_rows(("alice",))[:4]), "window_tokens": 4}
    at, head = adapter.read(), adapter.layout.head
    grads = {}
    for own in (None, at[head].clone()):
        training = TrainingOptions(learning_rate=0.1, max_steps=1)
        run = LocalTrainer(adapter, (), training, steps=1, pad_token_id=0, seed=0, head=own)
        _, grads[own is None] = run.loss_and_grad(at, batch)
    assert grads[True][head].any()
    assert not grads[False][head].any()
    assert torch.equal(grads[True][: head.start], grads[False][: head.start])
    adapter.close()

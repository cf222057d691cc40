"""Whole runs in which some clients differ: their own steps, rates, lengths, ranks and modules."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pfl_lm.cli.app import app
from pfl_lm.errors import ExportError, RecipeError
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.messages import Assignment, Update
from pfl_lm.finetune import finetune
from pfl_lm.membership import join
from pfl_lm.plan import make_plan
from pfl_lm.preflight import check_recipe
from pfl_lm.recipe import load_recipe
from pfl_lm.resume import run_recipe
from tests.interruptions import cli, go_on, stopped, whole
from tests.same import check_same
from tests.tiny import client_rows, tiny_model, tiny_recipe, write_jsonl

CLIENTS = ("alice", "bob", "carol")
SMALLER: list[dict[str, Any]] = [
    {"match": {"ids": ["alice"]}, "r": 3},
    {"match": {"ids": ["b*"]}, "r": 2, "target_modules": ["q_proj", "o_proj"], "max_steps": 3},
]
MIXING = ("local", "flexlora", "hetlora")


def run(folder: Path, rules: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return finetune(load_recipe(tiny_recipe(folder, clients=rules or [], **changes))).folder


def turns(folder: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        query = "SELECT round, client, steps, bytes_up, bytes_down FROM turns ORDER BY 1, 2"
        return ledger.execute(query).fetchall()


def state(folder: Path, client: str) -> bytes:
    return (folder / "clients" / client / "state-2.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("rule", "everywhere"),
    [
        ({"max_steps": 3}, {"training.max_steps": 3}),
        ({"local_epochs": 2}, {"training.max_steps": None, "training.local_epochs": 2}),
        ({"learning_rate": 0.03}, {"training.learning_rate": 0.03}),
        ({"max_length": 85}, {"data.max_length": 85}),
    ],
    ids=lambda value: next(iter(value)),
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_client_does_what_it_would_if_the_recipe_said_so_for_all(
    tmp_path: Path, rule: dict[str, Any], everywhere: dict[str, Any], optimizer: str
) -> None:
    """To the bit; and nobody else does anything but what they did."""
    how = {"method.name": "local", "training.optimizer": optimizer}
    rules = [{"match": {"ids": ["bob"]}, **rule}]
    found = run(tmp_path / "rules", rules, **how)
    plain = run(tmp_path / "plain", **how)
    other = run(tmp_path / "other", **how, **everywhere)
    assert state(found, "bob") == state(other, "bob") != state(plain, "bob")
    for client in ("alice", "carol"):
        assert state(found, client) == state(plain, client) != state(other, client)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = (path / "adapters" / "bob" / name for path in (found, other))
        assert one.read_bytes() == two.read_bytes()


def test_a_rule_that_says_what_the_recipe_says_changes_no_bit(tmp_path: Path) -> None:
    rules = [{"match": {"min_train_rows": 1}, "max_steps": 2, "learning_rate": 0.1}]
    check_same(run(tmp_path / "a", rules), run(tmp_path / "b"), apart=("adapters/", "global/READ"))


@pytest.mark.parametrize("method", MIXING)
def test_clients_of_several_ranks_keep_send_and_export_their_own(
    tmp_path: Path, method: str
) -> None:
    changes = {"method.name": method, "training.learning_rate": 0.5, "clients": SMALLER}
    recipe = tiny_recipe(tmp_path, **changes)
    checked = check_recipe(recipe)
    plan = make_plan(checked.loaded, checked.clients)
    folder = finetune(load_recipe(recipe)).folder

    index = json.loads((folder / "adapters.json").read_bytes())
    assert index["run"]["turn"] == "2 to 3 steps"
    q, v, o = 64 + 64, 64 + 32, 64 + 64  # in and out of each, on two layers
    sizes = {"alice": 3 * 2 * (q + v + 0), "bob": 2 * 2 * (q + o), "carol": 8 * 2 * (q + v)}
    shapes = {
        "alice": (3, ["q_proj", "v_proj"]),
        "bob": (2, ["o_proj", "q_proj"]),
        "carol": (8, ["q_proj", "v_proj"]),
    }
    for client in CLIENTS:
        own = folder / "adapters" / client
        held = load_file(folder / "clients" / client / "state-2.safetensors")
        assert {len(vector) for vector in held.values()} == {sizes[client]}
        config = json.loads((own / "adapter_config.json").read_bytes())
        r, modules = shapes[client]
        assert (config["r"], config["target_modules"]) == (r, modules)
        assert config["lora_alpha"] == 2 * r
        tensors = load_file(own / "adapter_model.safetensors")
        assert sum(each.numel() for each in tensors.values()) == sizes[client]
        assert {min(each.shape) for each in tensors.values()} == {r}
        check_as_peft_loads_it(own, tensors)
    sent = 0 if method == "local" else 4
    steps = {"alice": 2, "bob": 3, "carol": 2}
    down = [turn[4] for turn in turns(folder)]
    assert [turn[:4] for turn in turns(folder)] == [
        (n, c, steps[c], sent * sizes[c]) for n in (1, 2) for c in CLIENTS
    ]
    assert plan.smaller
    assert plan.steps == sum(turn[2] for turn in turns(folder)) == 14
    assert plan.up == (sum(t[3] for t in turns(folder)[:3]),) * 2
    assert plan.down == (sum(down[:3]),) * 2
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert sorted(plan.disk.files) == sorted(files)
    held_in_all = [load_file(p) for p in folder.rglob("*.safetensors")]
    assert plan.disk.at_end == sum(4 * t.numel() for f in held_in_all for t in f.values())
    if method != "local":
        whole_adapter = load_file(folder / "global" / "adapter_model.safetensors")
        assert sum(t.numel() for t in whole_adapter.values()) == 8 * 2 * (q + v + o)
        assert "other for some clients" in (folder / "global" / "README.md").read_text()
    card = (folder / "adapters" / "bob" / "README.md").read_text(encoding="utf-8")
    assert "3 steps a round" in card
    assert "r 2, alpha 4, dropout 0, on `q_proj`, `o_proj`" in card
    assert "alice" not in card
    assert "b*" not in card


def check_as_peft_loads_it(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Stock PEFT's model is the backbone with lora_alpha / r · B A added to its matrices."""
    from peft import PeftModel

    ids = torch.tensor([[5, 9, 40, 41, 7]])
    adapted = PeftModel.from_pretrained(_backbone(), folder)
    by_hand = _backbone()
    for key, a in tensors.items():
        if ".lora_A." in key:
            module = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
            b = tensors[key.replace("lora_A", "lora_B")]
            by_hand.get_submodule(module).weight.data += 2.0 * b @ a
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, by_hand(ids).logits, rtol=1e-4, atol=1e-5)


def _backbone() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)


@pytest.mark.parametrize("method", ["flexlora", "hetlora"])
def test_another_clients_data_reaches_others_through_averages_alone(
    tmp_path: Path, method: str
) -> None:
    """In round 1 everybody starts from the same, and nobody has heard of anybody."""
    rows = client_rows()
    other = [{**r, "completion": "No."} if r["client"] == "carol" else r for r in rows]
    found = []
    for name, data in (("a", rows), ("b", other)):
        (tmp_path / name).mkdir()
        path = write_jsonl(tmp_path / name / "rows.jsonl", data)
        changes = {"method.name": method, "data.path": str(path), "federation.rounds": 1}
        found.append(run(tmp_path / name, SMALLER, **changes, **{"training.learning_rate": 0.5}))
    for client in ("alice", "bob"):
        one, two = (f / "clients" / client / "state-1.safetensors" for f in found)
        assert one.read_bytes() == two.read_bytes()
    servers = [load_file(f / "server" / "state-1.safetensors")["global_weights"] for f in found]
    assert not torch.equal(*servers)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("method", ["flexlora", "hetlora"])
def test_stopped_anywhere_it_ends_the_same(tmp_path: Path, method: str, share: float) -> None:
    changes = {"method.name": method, "clients": SMALLER, "training.learning_rate": 0.5}
    folder = stopped(tmp_path / "a", round(share * 34), **changes)
    check_same(go_on(folder), whole(tmp_path / "b", **changes))


def test_a_run_goes_on_with_its_rules_or_not_at_all(tmp_path: Path) -> None:
    folder = run(tmp_path, [{"match": {"ids": ["bob"]}, "max_steps": 3}])
    rules = "clients=[{match: {ids: [bob]}, max_steps: 4}]"
    code, _, said = cli("finetune", str(tmp_path / "recipe.yaml"), "--resume", rules)
    assert code == 2
    assert "clients[0].max_steps: 4, and the run began with 3" in said
    assert turns(folder)[1][:3] == (1, "bob", 3)


def test_who_joins_goes_by_the_rules_too(tmp_path: Path) -> None:
    rules = [{"match": {"max_train_rows": 5}, "r": 2, "max_length": 85, "max_steps": 1}]
    rows = [*client_rows(("alice", "bob")), *client_rows(("carol",), n_rows=16)]
    data = {"data.path": str(write_jsonl(tmp_path / "rows.jsonl", rows))}
    folder = run(tmp_path, rules, **data, **{"method.name": "hetlora"})
    file = write_jsonl(tmp_path / "dora.jsonl", client_rows(("dora",)))
    join(folder, "dora", file)
    finetune(run_recipe(folder, 3), resume=True)
    ranks = {
        client: json.loads((folder / "adapters" / client / "adapter_config.json").read_bytes())["r"]
        for client in (*CLIENTS, "dora")
    }
    assert ranks == {"alice": 2, "bob": 2, "carol": 8, "dora": 2}
    assert [turn[:3] for turn in turns(folder) if turn[1] == "dora"] == [
        (2, "dora", 1),
        (3, "dora", 1),
    ]


def test_a_try_with_less_memory_keeps_a_clients_own_steps_and_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [{"match": {"ids": ["bob"]}, "max_steps": 3, "learning_rate": 0.03}]
    train, tried = ClientSide._train, list[bool]()

    def spoiled(self: ClientSide, task: Assignment) -> Update:
        if task.client == "bob" and task.round == 1:
            tried.append(task.halved)
            made = self.local_run("bob", task.steps, task.seed, halved=task.halved)
            assert made.training.learning_rate == made.learning_rate == 0.03
            assert made.training.per_device_train_batch_size == (1 if task.halved else 2)
            if not task.halved:
                raise MemoryError
        return train(self, task)

    monkeypatch.setattr(ClientSide, "_train", spoiled)
    folder = run(tmp_path, rules)
    assert tried == [False, True]
    assert [turn[:3] for turn in turns(folder)][1] == (1, "bob", 3)


def test_auto_asks_each_client_with_its_own_steps(tmp_path: Path) -> None:
    rules = [{"match": {"ids": ["bob"]}, "max_steps": 5}]
    folder = run(tmp_path, rules, **{"training.learning_rate": "auto"})
    assert [turn[2] for turn in turns(folder)] == [2, 5, 2] * 2


@pytest.mark.parametrize("method", MIXING)
def test_rows_are_protected_and_accounted_for_as_each_client_trains(
    tmp_path: Path, method: str
) -> None:
    lever = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-3}
    how = {"method.name": method, "privacy.record_level": lever}
    folder = run(tmp_path, SMALLER, **how)
    with closing(sqlite3.connect(folder / "federation.sqlite")) as ledger:
        noted = ledger.execute("SELECT client, summary FROM turns WHERE round = 1").fetchall()
    steps = {client: json.loads(summary)["dp_steps"] for client, summary in noted}
    assert steps == {"alice": 2, "bob": 3, "carol": 2}
    checked = check_recipe(tmp_path / "recipe.yaml", ["name=other"])
    spent = make_plan(checked.loaded, checked.clients).spent.record_level
    even = check_recipe(tmp_path / "recipe.yaml", ["name=other", "clients=[]"])
    less = make_plan(even.loaded, even.clients).spent.record_level
    assert spent is not None
    assert less is not None
    assert spent.epsilon > less.epsilon  # bob's steps are the most


def test_plan_and_preview_tell_of_them(tmp_path: Path) -> None:
    rules = [{"match": {"ids": ["bob"]}, "max_length": 85, "r": 2}]
    recipe = str(tiny_recipe(tmp_path, clients=rules, **{"method.name": "hetlora"}))
    planned = CliRunner().invoke(app, ["plan", recipe]).stdout
    assert "max_length 85, r 2" in " ".join(planned.split())
    assert "of the largest" in planned
    shown = CliRunner().invoke(app, ["preview", recipe]).stdout
    of = dict(part.split("\n", 1) for part in shown.split("\n\n")[1:])
    assert "the first 85 of" in of["bob"]
    assert "the first" not in of["alice"]


def test_rows_that_are_too_long_for_one_client_are_an_error_for_it(tmp_path: Path) -> None:
    rules = [{"match": {"ids": ["bob"]}, "max_length": 60}]
    recipe = str(tiny_recipe(tmp_path, clients=rules, **{"data.on_long": "error"}))
    code, _, said = cli("finetune", recipe)
    assert code == 2
    assert "data.on_long is error, data.max_length 128, and some rows are longer" in said
    assert "(client 'bob'): " in said
    assert "tokens, the most of this client is 60" in said
    assert "alice" not in said


def test_bench_and_diagnose_refuse_what_they_do_not_measure(tmp_path: Path) -> None:
    from pfl_lm.bench.case import load_case
    from pfl_lm.diagnose import client_figures

    folder = run(tmp_path, SMALLER, **{"method.name": "local"})
    loaded = run_recipe(folder)
    with pytest.raises(ExportError) as caught:
        list(client_figures(loaded, 1, print))
    assert caught.value.message == (
        f"{folder}: its clients' adapters differ in rank or modules, and the figures are of "
        "adapters of one shape"
    )
    with pytest.raises(RecipeError) as refused:
        load_case(loaded, {}, torch.device("cpu"), tmp_path)
    assert str(refused.value) == (
        "clients: a measurement is of one client like all others\n"
        "  hint: leave the rules out for the measurement: clients=[]"
    )

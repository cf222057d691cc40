"""Two ranks on one machine: the same bytes as one process, and an end that both agree on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pfl_lm.errors import DataError, DismissedError, LostRankError, PflError
from pfl_lm.federation.client import ClientSide
from pfl_lm.federation.fleet import start
from pfl_lm.federation.fleet.start import connected, join_ranks, lone_launch, rank_0_first
from pfl_lm.finetune import finetune
from pfl_lm.recipe import RuntimeOptions, load_recipe
from tests.federation import rank_runs
from tests.federation.rank_runs import same_secret
from tests.same import facts_in
from tests.tiny import tiny_recipe

ROOT = Path(__file__).parents[2]
PATIENCE = 120
"""Seconds after which a test of ranks has hung."""

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RUNS = ("-m", "tests.federation.rank_runs")
RECIPES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "auto": {"training.learning_rate": "auto"},
    "mixed": {
        "method.name": "flexlora",
        "clients": [{"match": {"ids": ["bob"]}, "r": 2, "max_steps": 3, "learning_rate": 0.2}],
    },
    "private": {
        "privacy.record_level": {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-3},
        "privacy.client_level": {"noise_multiplier": 1.0, "clip_norm": 1.0, "delta": 1e-3},
        "method.weighting": "uniform",
    },
}
TWO_RANKS = (
    "start it with  torchrun --nproc-per-node 2 -m pfl_lm finetune RECIPE "
    "(on CPUs with ACCELERATE_USE_CPU=true before it)"
)


def environment(**more: str) -> dict[str, str]:
    alone = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return os.environ | {"PYTHONPATH": str(ROOT)} | alone | more


def launch(*arguments: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**more),
        cwd=ROOT,
    )


def by_hand(*arguments: str) -> list[subprocess.Popen[str]]:
    """Start two ranks without torchrun, which would end one of them when the other ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [{"RANK": n, "LOCAL_RANK": n} for n in ("0", "1")]
    return [launch(*arguments, **job, **rank) for rank in ranks]


Ended = tuple[int, str, str]


def end_of(process: subprocess.Popen[str]) -> Ended:
    """Wait for its end; return its exit code, what it printed and what it said on stderr."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    noise = ("ProcessGroup", "kernels-community")  # of PyTorch, and of what PEFT imports
    lines = [line for line in err.splitlines() if not any(each in line for each in noise)]
    return process.returncode, out, "\n".join(lines)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def recipe(place: Path, name: str, **changes: Any) -> Path:
    (place / name).mkdir()
    return tiny_recipe(place / name, **changes)


def results_in(folder: Path) -> dict[str, bytes]:
    """Return what must be equal: all but clocks and paths."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    apart = {"recipe.yaml", "recipe.resolved.yaml", "federation.sqlite"}
    return {name: path.read_bytes() for name, path in files.items() if name not in apart}


@pytest.fixture(scope="module")
def ranks(place: Path) -> list[Ended]:
    """Run the recipes on two ranks and then one that fails, and meanwhile the same here."""
    well = [str(recipe(place, f"two-{name}", **how)) for name, how in RECIPES.items()]
    failing = str(recipe(place, "failing"))
    faulty = str(recipe(place, "two-faulty"))
    spoiled = ("--faulty", "carol", faulty, "--failing", "alice", failing)
    started = by_hand(*RUNS, *well, *spoiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pfl_lm.federation.noise.secrets.randbits", same_secret)
        for name, how in RECIPES.items():
            finetune(load_recipe(recipe(place, f"one-{name}", **how)))
        patch.setattr(ClientSide, "_train", ClientSide._train)  # to be put back
        patch.setenv("RANK", "1")  # whose turn carol's is there, the second longest
        rank_runs.spoil("--faulty", "carol")
        finetune(load_recipe(recipe(place, "one-faulty")))
    return [end_of(process) for process in started]


@pytest.mark.parametrize("name", [*RECIPES, "faulty"])
def test_two_ranks_leave_the_same_bytes_as_one_process(
    ranks: list[Ended], place: Path, name: str
) -> None:
    alone, shared = (results_in(place / f"{n}-{name}" / "runs" / "tiny") for n in ("one", "two"))
    assert {"adapters.json", "metrics.csv", "adapters/bob/adapter_model.safetensors"} <= set(alone)
    assert shared == alone
    facts = [facts_in(place / f"{n}-{name}" / "runs" / "tiny") for n in ("one", "two")]
    assert facts[1]["run"] == facts[0]["run"]  # so that neither is told that it differs
    (_, out, _), (_, other_out, _) = ranks
    assert out.count("round 2/2") == len(RECIPES) + 1  # once for each recipe: one rank speaks
    assert other_out == ""


def test_a_turn_that_fails_on_rank_1_is_left_out(ranks: list[Ended], place: Path) -> None:
    facts = [facts_in(place / f"{n}-faulty" / "runs" / "tiny") for n in ("one", "two")]
    # On two ranks carol's second try is the only task, on rank 0.
    assert [row[:4] for row in facts[1]["faults"]] == [row[:4] for row in facts[0]["faults"]]
    assert {row[1] for row in facts[1]["turns"]} == {"alice", "bob"}


def test_a_clients_failure_on_rank_1_ends_both(ranks: list[Ended], place: Path) -> None:
    (code, _, said), (other_code, _, other_said) = ranks
    assert (code, other_code) == (2, 2)
    assert said == "client 'alice' on rank 1\n  hint: lower it"
    assert other_said == ""
    metrics = (place / "failing" / "runs" / "tiny" / "metrics.csv").read_text()
    later = [line for line in metrics.splitlines()[1:] if not line.startswith("0,")]
    assert [line.split(",")[:2] for line in later] == [["1", "bob"]]  # rank 0 was done with him


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.max_steps=0", "training.max_steps=0: "),
        ("data.max_length=8", "client 'alice': 0 of 5 train rows keep a supervised token"),
    ],
)
def test_what_both_find_wrong_is_said_once(place: Path, override: str, said: str) -> None:
    """The first is found before they are connected, the second when each has a backbone."""
    command = ("-m", "pfl_lm", "finetune", str(recipe(place, override)), override)
    (code, _, err), (other_code, _, other_err) = map(end_of, by_hand(*command))
    assert (code, other_code) == (2, 2)
    assert err.count(said) == 1
    assert other_err == ""


@pytest.mark.slow
def test_torchrun_starts_them(place: Path) -> None:
    command = ("-m", "pfl_lm", "finetune", str(recipe(place, "torchrun")))
    code, out, err = end_of(launch(*TORCHRUN, *command, "runtime.parallel=clients"))
    assert code == 0, err
    assert out.count("round 2/2") == 1
    finetune(load_recipe(recipe(place, "without")))
    launched, alone = (results_in(place / n / "runs" / "tiny") for n in ("torchrun", "without"))
    told = {
        name: text.replace(b"parallel: clients", b"parallel: auto")
        for name, text in launched.items()
    }
    assert told == alone  # the cards show the recipe


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other(place: Path) -> None:
    started = by_hand(*RUNS, "--dying", "carol", str(recipe(place, "dying")))
    (code, _, said), (other_code, _, _) = map(end_of, started)
    assert (code, other_code) == (2, -9)
    assert said == (
        "another rank has ended before its time\n"
        "  hint: it has said why; if it said nothing it was killed, as for want of memory"
    )


# --- one process ----------------------------------------------------------------------------------


class Alone:
    """As much of an Accelerator as is asked for, and what it was made with."""

    num_processes, is_main_process = 1, True
    made_with: dict[str, Any]

    def __init__(self, **how: Any) -> None:
        Alone.made_with = how


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(start, "Accelerator", Alone)


@pytest.mark.usefixtures("no_launcher")
def test_ranks_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_ranks(RuntimeOptions()).num_processes == 1
    with pytest.raises(PflError) as caught:
        join_ranks(RuntimeOptions(parallel="clients"))
    only = "runtime.parallel: clients needs several processes, and this is the only one"
    assert (caught.value.message, caught.value.hint) == (only, TWO_RANKS)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(PflError) as caught:
        join_ranks(RuntimeOptions(parallel="clients"))
    assert caught.value.message == f"{only} (accelerate launch --cpu starts one)"


@pytest.mark.usefixtures("no_launcher")
def test_ranks_wait_for_each_other_longer_than_any_turn_takes() -> None:
    join_ranks(RuntimeOptions())
    [patience] = Alone.made_with["kwargs_handlers"]
    assert patience.timeout.days >= 1


@pytest.mark.usefixtures("no_launcher")
def test_a_lone_launch_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lone_launch() is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    two = TWO_RANKS.removeprefix("start it with")
    assert lone_launch() == f"accelerate launch has started one process; for two ranks type{two}"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert lone_launch() is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lone_launch() is None


def test_a_rank_without_its_rank_0_says_what_is_the_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(faults: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Alone, "is_main_process", False)
    monkeypatch.setattr(start, "gather_object", gone)
    accelerator: Any = Alone()
    with pytest.raises(LostRankError, match="another rank has ended"):
        rank_0_first(accelerator, lambda: pytest.fail("rank 0 did not come through"))
    with pytest.raises(ValueError, match="ours"), connected():
        raise ValueError("ours")


@pytest.mark.parametrize(
    ("main", "raised", "said"),
    [(True, DataError, "no such file on rank 1"), (False, DismissedError, "rank 0 says why")],
)
def test_what_another_rank_could_not_prepare_is_said_by_rank_0(
    monkeypatch: pytest.MonkeyPatch, main: bool, raised: type[PflError], said: str
) -> None:
    gathered = [[None, None], [None, DataError("no such file on rank 1")]]
    monkeypatch.setattr(Alone, "is_main_process", main)
    monkeypatch.setattr(start, "gather_object", lambda faults: gathered.pop(0))
    accelerator: Any = Alone()
    with pytest.raises(raised, match=said):
        rank_0_first(accelerator, lambda: "prepared")


def test_a_bug_is_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator: Any = Alone()
    with pytest.raises(ZeroDivisionError):
        rank_0_first(accelerator, lambda: 1 // 0)
    assert rank_0_first(accelerator, lambda: "prepared") == "prepared"

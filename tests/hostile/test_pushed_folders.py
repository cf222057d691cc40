"""Run folders of strangers, through `pfl-lm push --dry-run`."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.errors import PflError
from pfl_lm.export.plan import plan_push
from tests.hostile.hostile import NAMES, names, values
from tests.hostile.watched import Watched, examples, report

REPO = "some-org/adapters"
CARD = "# x\n<!-- pfl-lm: load -->\ncode\n<!-- /pfl-lm: load -->\n"
CONFIG = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "/a/folder", "revision": None}
CLIENTS = ("alice", "bob")
FILES = [
    f"adapters/{client}/{name}"
    for client in CLIENTS
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "tokenizer.json",
    )
]
PLACES = ["adapters.json", "adapters", "adapters/alice", "adapters/bob", *FILES]


def weights(client: str) -> bytes:
    header = json.dumps({"__metadata__": {"format": "pt"}, client: {}}).encode()
    return len(header).to_bytes(8, "little") + header


def index() -> dict[str, Any]:
    return {
        "format": 1,
        "run": {"name": "r", "method": "local", "rounds": 2, "turn": "2 steps", "prompts": "chat"},
        "base": {"model_name_or_path": "org/base", "revision": None, "dtype": "float32"},
        "clients": {
            client: {
                "slug": client,
                "candidate": "local",
                "reason": "because",
                "rows": {"train": 6, "validation": 1, "test": 2},
                "scores": {"validation": {"base": 2.0, "local": 1.5}, "test": {"base": 2.5}},
                "sha256": hashlib.sha256(weights(client)).hexdigest(),
            }
            for client in CLIENTS
        },
    }


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """The current folder, with a finished run in `run`, and things outside of it."""
    work = tmp_path / "a" / "work"
    for client in CLIENTS:
        folder = work / "run" / "adapters" / client
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
        (folder / "adapter_model.safetensors").write_bytes(weights(client))
        (folder / "README.md").write_text(CARD)
        (folder / "tokenizer.json").write_text("{}")
    (work / "run" / "adapters.json").write_text(json.dumps(index()))
    shutil.copytree(work / "run", tmp_path / "other")
    (tmp_path / "outside").write_text("DECOY")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path))
    return Watched(tmp_path)


def push(runs: Watched, *more: str) -> None:
    """Plan a push; where there is a plan, nothing from outside is in it."""
    code, _, _ = runs.run("push", "run", "--repo", REPO, "--dry-run", *more)
    if code == 0:
        for file in plan_push(Path("run"), REPO, remote=None).files:
            assert b"DECOY" not in file.content()


def test_the_run_that_is_changed_is_fine(runs: Watched) -> None:
    code, stdout, _ = runs.run("push", "run", "--repo", REPO, "--dry-run")

    assert code == 0
    assert stdout.count("clients/alice/") == 4


def places(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the keys that lead to each value."""
    if at:
        yield at
    for key, inside in value.items() if isinstance(value, dict) else ():
        yield from places(inside, (*at, key))


Change = Callable[[Any], None]


def _set(at: tuple[str, ...], key: str | None, value: Any) -> Change:
    def change(data: Any) -> None:
        *above, last = at
        with suppress(KeyError, TypeError):
            for part in above:
                data = data[part]
            if key is not None:
                data[key] = data.pop(last)
            else:
                data[last] = value

    return change


somewhere = st.sampled_from(list(places(index())))
slugs = st.sampled_from([("clients", client, "slug") for client in CLIENTS])
changes = st.one_of(
    st.builds(_set, somewhere, st.none(), values()),
    st.builds(_set, somewhere, names, st.none()),
    st.builds(_set, slugs, st.none(), st.sampled_from([*NAMES, "../bob", "bob", "bob/", "x" * 80])),
    st.builds(_set, st.just(("clients", "alice")), st.sampled_from(NAMES), st.none()),
    st.builds(
        _set,
        st.sampled_from([("base", "model_name_or_path"), ("base", "revision")]),
        st.none(),
        st.sampled_from(NAMES),
    ),
)
SNIPPETS = [
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\xfe\xff", b"NaN", b"Infinity", b"1e999", b"9" * 5000),
    *(b"[" * 5000, b'{"a":' * 5000, b"{", b"}", b"]", b",", b'"', b"\\", b"\\ud800", b"\\u001b[2J"),
    *("\u202e".encode(), b'"format": 1,', b'"x": 1,', b"x" * 100_000),
]
cuts = st.lists(
    st.tuples(st.integers(0, 3000), st.integers(0, 40), st.sampled_from(SNIPPETS) | st.binary()),
    min_size=1,
    max_size=3,
)


def cut(content: bytes, made: list[tuple[int, int, bytes]]) -> bytes:
    for at, length, snippet in made:
        at %= len(content) + 1
        content = content[:at] + snippet + content[at + length :]
    return content


def test_indexes_with_other_values(runs: Watched) -> None:
    @examples(150)
    @given(st.lists(changes, min_size=1, max_size=2))
    def check(made: list[Change]) -> None:
        data = index()
        for change in made:
            change(data)
        with suppress(RecursionError):
            Path("run/adapters.json").write_text(json.dumps(data))
            push(runs)

    check()
    report(runs, 100)


@pytest.mark.parametrize("name", ["adapters.json", *FILES[:4]])
def test_files_with_other_bytes(runs: Watched, name: str) -> None:
    path = Path("run", name)
    good = path.read_bytes()

    @examples(40)
    @given(cuts)
    def check(made: list[tuple[int, int, bytes]]) -> None:
        path.write_bytes(cut(good, made))
        push(runs)

    check()
    assert runs.tried >= 30


def test_configs_with_other_values(runs: Watched) -> None:
    keys = st.sampled_from(list(CONFIG)) | names

    @examples(60)
    @given(keys, values(), cuts | st.just([]))
    def check(key: str, value: Any, made: list[tuple[int, int, bytes]]) -> None:
        with suppress(RecursionError):
            config = cut(json.dumps({**CONFIG, key: value}).encode(), made)
            Path("run/adapters/alice/adapter_config.json").write_bytes(config)
            push(runs)

    check()
    report(runs, 40)


def _link(to: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(to)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**36)


def _nothing(path: Path) -> None:
    pass


def _unreadable(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


def _swapped(path: Path) -> None:
    other = str(path).replace("alice", "*").replace("bob", "alice").replace("*", "bob")
    if Path(other).is_dir():
        shutil.copytree(other, path)
    elif Path(other).exists():
        shutil.copy(other, path)


OTHERS: list[Callable[[Path], object]] = [
    *(_nothing, Path.mkdir, Path.touch, os.mkfifo, _socket, _hole, _unreadable, _swapped),
    *(_link("/etc/passwd"), _link("/dev/zero"), _link("."), _link(".."), _link("nowhere")),
    *(map(_link, ("../outside", "../../../outside", "../../../../../outside"))),
    *(map(_link, ("../../../other", "../../../../other/adapters", "../bob", "bob", "alice"))),
]


def test_run_folders_with_other_things_in_them(runs: Watched) -> None:
    replaced = st.tuples(st.sampled_from(PLACES), st.sampled_from(OTHERS))

    @examples(150)
    @given(st.lists(replaced, min_size=1, max_size=2))
    def check(made: list[tuple[str, Callable[[Path], object]]]) -> None:
        shutil.rmtree("run")
        shutil.copytree(runs.root / "other", "run")
        for name, make in made:
            path = Path("run", name)
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                make(path)
        push(runs)

    check()
    report(runs, 120)


@pytest.mark.parametrize("make", [make for make in OTHERS if make is not _swapped])
def test_what_is_no_run_folder(runs: Watched, make: Callable[[Path], object]) -> None:
    shutil.rmtree("run")
    make(Path("run"))

    push(runs)

    assert runs.refused == 1


def test_other_arguments(runs: Watched) -> None:
    @examples(60)
    @given(names, names, st.lists(names, max_size=2))
    def check(folder: str, repo: str, clients: list[str]) -> None:
        more = [f"--clients={client}" for client in clients]
        runs.run("push", f"--repo={repo}", "--dry-run", *more, "--", folder)
        runs.run("push", f"--repo={REPO}", "--dry-run", *more, "--", "run")

    check()
    report(runs, 100)


LARGE = {
    "an index that is too large": b'{"format": 1' + b" " * 70 * 2**20,
    "a deep index": b'{"format":' * 2**20,
    "a long number": json.dumps(index())
    .replace('"rounds": 2', f'"rounds": {"9" * 10**6}')
    .encode(),
    "many clients": json.dumps(
        index()
        | {
            "clients": {
                f"c{i}": copy.deepcopy(index()["clients"]["alice"]) | {"slug": f"c{i}"}
                for i in range(20_000)
            }
        }
    ).encode(),
}


@pytest.mark.parametrize("case", LARGE)
def test_large_indexes_are_refused(runs: Watched, case: str) -> None:
    Path("run/adapters.json").write_bytes(LARGE[case])

    push(runs)

    assert runs.refused == 1


def test_a_long_name_of_a_key_is_cut(runs: Watched) -> None:
    data = index()
    data["clients"]["x" * 200_000] = 1
    Path("run/adapters.json").write_text(json.dumps(data))

    push(runs)


def test_an_error_is_an_error_here_too(runs: Watched) -> None:
    Path("run/adapters.json").write_text("{}")

    with pytest.raises(PflError):
        plan_push(Path("run"), REPO, remote=None)

"""Reading run folders of strangers: ``adapters.json``, and files that are not what they seem."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from pfl_lm.errors import ExportError
from pfl_lm.export.index import parse_index, read_index

GOOD: dict[str, Any] = {
    "format": 1,
    "run": {
        "name": "r",
        "method": "pflalign",
        "rounds": 2,
        "turn": "2 steps",
        "prompts": "chat",
    },
    "base": {"model_name_or_path": "org/base", "revision": None, "dtype": "float32"},
    "clients": {
        name: {
            "slug": name,
            "candidate": "local",
            "reason": "because",
            "rows": {"train": 1, "validation": 1, "test": 0},
            "scores": {"validation": {"base": 1.0, "local": None}},
            "sha256": "0" * 64,
        }
        for name in ("a", "b")
    },
}
ALICE = ("clients", "a")
BROKEN: list[tuple[tuple[str, ...], Any, str]] = [
    (("format",), 2, "format: Input should be 1"),
    (("more",), 1, "more: Extra inputs are not permitted"),
    (("clients",), {}, "clients: Dictionary should have at least 1 item"),
    ((*ALICE, "slug"), "../../etc", "clients.a.slug: String should match pattern"),
    ((*ALICE, "slug"), "a/b", "clients.a.slug: String should match pattern"),
    ((*ALICE, "slug"), "A", "clients.a.slug: String should match pattern"),
    ((*ALICE, "slug"), "a\n", "clients.a.slug: String should match pattern"),
    ((*ALICE, "slug"), "", "clients.a.slug: String should match pattern"),
    ((*ALICE, "slug"), "x" * 81, "clients.a.slug: String should match pattern"),
    (
        ("run", "rounds"),
        10**4000,
        "run.rounds: Input should be less than or equal to 92233720368547",
    ),
    (("clients", "x" * 5000), 1, f"clients.{'x' * 57}...: Input should be an object"),
    ((*ALICE, "slug"), 7, "clients.a.slug: Input should be a valid string"),
    ((*ALICE, "slug"), "b", "the file: Value error, two clients have the same slug"),
    ((*ALICE, "sha256"), "0" * 63, "clients.a.sha256: String should match pattern"),
    ((*ALICE, "sha256"), "G" * 64, "clients.a.sha256: String should match pattern"),
    ((*ALICE, "candidate"), "<b>", "clients.a.candidate: String should match pattern"),
    ((*ALICE, "reason"), "a\nb", "clients.a.reason: Value error, must be one line of text"),
    ((*ALICE, "path"), "/etc/passwd", "clients.a.path: Extra inputs are not permitted"),
    ((*ALICE, "scores"), {"train": {}}, "clients.a.scores.train.[key]: Input should be"),
    ((*ALICE, "scores"), {"test": {"base": "1"}}, "clients.a.scores.test.base: Input should be"),
    ((*ALICE, "rows", "train"), -1, "clients.a.rows.train: Input should be greater than"),
    (("run", "name"), "a/b", "run.name: String should match pattern"),
    (("run", "prompts"), "shout", "run.prompts: Input should be"),
    (("run", "rounds"), True, "run.rounds: Input should be a valid integer"),
    (("base", "dtype"), "float32; rm", "base.dtype: String should match pattern"),
]


@pytest.mark.parametrize(("at", "value", "said"), BROKEN)
def test_an_index_is_read_strictly(at: tuple[str, ...], value: Any, said: str) -> None:
    content = copy.deepcopy(GOOD)
    place = content
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = value

    with pytest.raises(ExportError) as caught:
        parse_index(json.dumps(content).encode(), "x/adapters.json")

    assert caught.value.message.startswith(
        "x/adapters.json: not an index of adapters as this version writes it: "
    )
    assert said in caught.value.message


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"\xff", b'{"format": NaN}', b"[" * 100_000, b"null"]
)
def test_what_is_no_index_at_all(raw: bytes) -> None:
    with pytest.raises(ExportError, match="not an index of adapters"):
        parse_index(raw, "x")


def test_an_index_reads_back_as_it_was_written() -> None:
    index = parse_index(json.dumps(GOOD).encode(), "x")

    assert parse_index(index.text(), "x") == index
    assert json.loads(index.text()) == GOOD


def test_a_client_of_any_name_reads_back() -> None:
    names = {"a": "](x) <b> \u202e é", "b": "x" * 50_000}
    content = GOOD | {"clients": {name: GOOD["clients"][of] for of, name in names.items()}}

    index = parse_index(json.dumps(content).encode(), "x")

    assert parse_index(index.text(), "x").clients.keys() == content["clients"].keys()


def test_folders_that_are_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no such folder"):
        read_index(tmp_path / "nope")
    with pytest.raises(ExportError, match=r"cannot be looked at \(File name too long\)"):
        read_index(tmp_path / ("x" * 300))
    with pytest.raises(ExportError, match=r"no adapters\.json in it") as caught:
        read_index(tmp_path)
    assert caught.value.hint is not None
    assert "a run that was stopped has no adapters" in caught.value.hint

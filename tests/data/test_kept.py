"""Rows in tokens that are kept on disk: equal to those made anew, or not used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pfl_lm.data import kept
from pfl_lm.data.content import Conversation, PromptCompletion, Text, Turn
from pfl_lm.data.examples import Example
from pfl_lm.data.federated import FederatedDataset
from pfl_lm.data.render import render
from pfl_lm.data.splits import split_clients
from pfl_lm.errors import DataError
from tests.data.files import Options, read_records, write
from tests.tiny import CHATML, make_tokenizer

CONTENTS = [
    PromptCompletion("A quince?", "A fruit."),
    Conversation(
        (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    ),
    Text("It was the best of times."),
    Text("x"),
]


class Maker:
    """Makes the examples, and counts how often."""

    def __init__(self, tokenizer: Any, contents: list[Any] = CONTENTS) -> None:
        self.tokenizer, self.contents, self.times = tokenizer, contents, 0

    def __call__(self) -> list[Example]:
        self.times += 1
        return [render(self.tokenizer, content) for content in self.contents]


@pytest.fixture
def maker(tiny_tokenizer: Any) -> Maker:
    return Maker(tiny_tokenizer)


def keep(folder: Path, maker: Maker) -> list[Example]:
    return kept.keep(folder, maker.tokenizer, maker.contents, maker)


def test_what_is_kept_is_what_was_made(tmp_path: Path, maker: Maker) -> None:
    made = keep(tmp_path / "tokens", maker)

    assert keep(tmp_path / "tokens", maker) == made == maker()
    assert maker.times == 2  # the first time, and just now
    [file] = (tmp_path / "tokens").iterdir()
    assert (file.parent.stat().st_mode & 0o777, file.suffix) == (0o700, ".safetensors")


def test_equal_tokens_are_one_object(tmp_path: Path, maker: Maker) -> None:
    keep(tmp_path, maker)
    first, again = keep(tmp_path, maker), keep(tmp_path, maker)
    big = [token for example in first for token in example.input_ids if token > 256]

    assert len({id(token) for token in big}) == len(set(big))
    assert first == again


def other_tokenizers() -> dict[str, Any]:
    changed = CHATML.replace("few words", "fewer words")
    special = make_tokenizer()
    special.add_tokens(["qui"])
    return {
        "template": make_tokenizer(changed),
        "end of text": make_tokenizer(eos="<|im_start|>"),
        "vocabulary": special,
        "first token": make_tokenizer(prepend_bos=True),
    }


@pytest.mark.parametrize("change", ["template", "end of text", "vocabulary", "first token"])
def test_another_tokenizer_makes_its_own(tmp_path: Path, maker: Maker, change: str) -> None:
    keep(tmp_path, maker)
    other = Maker(other_tokenizers()[change])

    keep(tmp_path, other)

    assert (other.times, len(list(tmp_path.iterdir()))) == (1, 2)


@pytest.mark.parametrize(
    "contents",
    [
        CONTENTS[:3],
        [*CONTENTS[1:], CONTENTS[0]],
        [PromptCompletion("A quince", "?A fruit."), *CONTENTS[1:]],
        [*CONTENTS[:3], PromptCompletion("x", "x")],
    ],
)
def test_other_rows_make_their_own(tmp_path: Path, maker: Maker, contents: list[Any]) -> None:
    keep(tmp_path, maker)
    other = Maker(maker.tokenizer, contents)

    assert keep(tmp_path, other) == other()
    assert other.times == 2


def test_other_rules_make_their_own(
    tmp_path: Path, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path, maker)
    monkeypatch.setattr(kept, "RULES", kept.RULES + 1)
    keep(tmp_path, maker)

    assert maker.times == 2


def test_a_template_that_writes_the_day_is_of_its_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(CHATML + "{# strftime_now #}")
    days = iter([1, 2])

    class Day:
        @staticmethod
        def today() -> int:
            return next(days)

    monkeypatch.setattr(kept, "date", Day)
    assert kept.tokenizer_sha256(tokenizer) != kept.tokenizer_sha256(tokenizer)
    assert kept.tokenizer_sha256(make_tokenizer()) == kept.tokenizer_sha256(make_tokenizer())


def test_the_name_is_the_same_in_another_process(tiny_model_dir: Path) -> None:
    code = (
        "import sys; from transformers import AutoTokenizer; from pfl_lm.data import kept;"
        "print(kept.tokenizer_sha256(AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code, str(tiny_model_dir)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] != ""


def spoilt(columns: dict[str, Any], change: str) -> dict[str, Any]:
    """Change what is kept, and leave a hash that fits."""
    columns = {name: numbers.copy() for name, numbers in columns.items()}
    match change:
        case "a token that is none":
            columns["ids"][0] = 1_000_000
        case "a token below 0":
            columns["ids"][0] = -1
        case "a row less":
            columns["lengths"] = columns["lengths"][:-1]
        case "a length too many":
            columns["lengths"][0] += 1
        case "a negative length":
            columns["lengths"][:2] += [-1000, 1000]
        case "a span too few":
            columns["spans"] = columns["spans"][:-2]
        case "a span that is empty":
            columns["spans"][1] = columns["spans"][0]
        case "a span beyond the row":
            columns["spans"][1] = 10_000
        case "a span at 0":
            columns["spans"][0] = 0
        case "spans that overlap":
            columns["spans"][4] = columns["spans"][2]
        case "another type":
            columns["ids"] = columns["ids"].astype(np.int64)
        case "another form":
            columns["ids"] = columns["ids"][None]
        case "another column":
            columns["more"] = columns["ids"]
    return columns


CHANGES = (
    *("a token that is none", "a token below 0", "a row less", "a length too many"),
    *("a negative length", "a span too few", "a span that is empty", "a span beyond the row"),
    *("a span at 0", "spans that overlap", "another type", "another form", "another column"),
)


@pytest.mark.parametrize("change", CHANGES)
def test_numbers_that_cannot_be_are_made_anew(tmp_path: Path, maker: Maker, change: str) -> None:
    made = keep(tmp_path, maker)
    [file] = tmp_path.iterdir()
    columns = spoilt(load_file(file), change)
    save_file(columns, file, metadata={"sha256": kept._sha256(columns)})

    assert keep(tmp_path, maker) == made
    assert maker.times == 2


def test_a_hash_that_does_not_fit_is_made_anew(tmp_path: Path, maker: Maker) -> None:
    made = keep(tmp_path, maker)
    [file] = tmp_path.iterdir()
    columns = load_file(file)
    told = kept._sha256(columns)
    columns["ids"][0] ^= 1  # still a token
    save_file(columns, file, metadata={"sha256": told})

    assert keep(tmp_path, maker) == made
    save_file(load_file(file), file)  # without a hash
    assert keep(tmp_path, maker) == made
    assert maker.times == 3


@pytest.mark.parametrize("content", [b"", b"x" * 1000, b"\xff" * 8 + b"{}"])
def test_a_file_that_is_none_is_made_anew(tmp_path: Path, maker: Maker, content: bytes) -> None:
    made = keep(tmp_path, maker)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    for spoilt in (content, whole[:-1], whole + b"x"):
        file.write_bytes(spoilt)
        assert keep(tmp_path, maker) == made
        assert file.read_bytes() == whole
    assert maker.times == 4


def test_a_pipe_is_not_waited_for(tmp_path: Path, maker: Maker) -> None:
    made = keep(tmp_path, maker)
    [file] = tmp_path.iterdir()
    file.unlink()
    os.mkfifo(file)

    assert keep(tmp_path, maker) == made


def test_a_file_that_is_too_large_is_neither_read_nor_written(
    tmp_path: Path, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path / "read", maker)
    monkeypatch.setattr(kept, "MOST_BYTES", 100)
    keep(tmp_path / "read", maker)
    keep(tmp_path / "written", maker)

    assert maker.times == 3
    assert not (tmp_path / "written").exists()


def test_what_was_not_used_for_longest_goes(
    tmp_path: Path, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers = [Maker(maker.tokenizer, [Text("x" * 50 + str(i))]) for i in range(3)]
    files: list[Path] = []
    for i, each in enumerate(makers[:2]):
        keep(tmp_path, each)
        [new] = set(tmp_path.iterdir()) - {*files}
        os.utime(new, (i, i))
        files.append(new)
    keep(tmp_path, makers[0])  # used again, so that the second is the oldest
    monkeypatch.setattr(kept, "MOST_BYTES", int(2.5 * files[0].stat().st_size))

    keep(tmp_path, makers[2])

    assert files[0].exists()
    assert not files[1].exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path, maker: Maker) -> None:
    (tmp_path / "file").write_text("")

    made = keep(tmp_path / "file" / "tokens", maker)

    assert made == keep(tmp_path / "file" / "tokens", maker)
    assert maker.times == 3 - 1


def test_a_data_set_is_the_same_with_it_and_without(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [
        {"client": client, "prompt": "Say so.", "completion": "so " * n + client}
        for client in "ab"
        for n in range(1, 9)
    ]
    rows.append({"client": "a", "prompt": "Say so.", "completion": "so", "split": "test"})
    options = write(tmp_path, *({"split": "train"} | row for row in rows))
    options.split_column = "split"
    clients = split_clients(read_records(options), 0.25)
    whole = FederatedDataset.build(clients, tiny_tokenizer, 256)
    sides = [side for client in whole for side in (client.train, client.validation)]
    lengths = [[len(example.input_ids) for example in side] for side in sides]
    least, most = max(map(min, lengths)), max(map(max, lengths))
    assert least < most

    for length, on_long in ((256, "truncate"), (least, "truncate"), (least, "drop")):
        plain = FederatedDataset.build(clients, tiny_tokenizer, length, on_long)  # type: ignore[arg-type]
        for _ in range(2):
            same = FederatedDataset.build(
                clients,
                tiny_tokenizer,
                length,
                on_long,  # type: ignore[arg-type]
                kept=tmp_path / "tokens",
            )
            assert list(same) == list(plain)
            assert same.test("a") == plain.test("a") != ()
    assert len(list((tmp_path / "tokens").iterdir())) == 1  # whole rows are kept, and cut later


def test_long_rows_are_an_error_with_it_too(
    tmp_path: Path, clients_jsonl: Path, tiny_tokenizer: Any
) -> None:
    clients = split_clients(read_records(Options(str(clients_jsonl), split_column="split")), 0.25)
    told = []
    for kept_in in (None, tmp_path, tmp_path):
        with pytest.raises(DataError) as caught:
            FederatedDataset.build(clients, tiny_tokenizer, 20, "error", kept=kept_in)
        told.append(str(caught.value))
    assert told[0] == told[1] == told[2]


def test_a_run_keeps_tokens_where_the_cache_is_and_only_if_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pfl_lm.federation.watch import Watch
    from pfl_lm.finetune import load_common
    from pfl_lm.preflight import check_recipe
    from tests.tiny import tiny_recipe

    monkeypatch.setenv("PFL_LM_CACHE", str(tmp_path / "cache"))
    import torch

    for choice, files in (("off", 0), ("auto", 1)):
        checked = check_recipe(tiny_recipe(tmp_path, **{"runtime.token_cache": choice}))
        load_common(checked.loaded.recipe, checked.clients, torch.device("cpu"), Watch())
        assert len(list(tmp_path.glob("cache/tokens/*"))) == files

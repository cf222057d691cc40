from __future__ import annotations

from typing import Any

import pytest

from pfl_lm.data.federated import FederatedDataset
from pfl_lm.data.preview import ClientPreview, Spread, pieces, preview_clients, supervised
from pfl_lm.data.sources import read_records
from pfl_lm.data.splits import ClientRows, split_clients
from pfl_lm.recipe import DataOptions
from tests.tiny import client_rows, write_jsonl

LONG = " and so on" * 60


@pytest.fixture
def clients(tmp_path: Any) -> Any:
    """Return a function from rows to the clients that a run would have."""

    def of(rows: list[dict[str, str]]) -> dict[str, ClientRows]:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        options = DataOptions(path=str(path), split_column="split")
        return split_clients(read_records(options), 0.2)

    return of


@pytest.fixture
def preview(clients: Any, tiny_tokenizer: Any) -> Any:
    """Return a function from rows to their previews by client."""

    def of(
        rows: list[dict[str, str]], max_length: int = 128, on_long: Any = "truncate"
    ) -> dict[str, ClientPreview]:
        previews = preview_clients(clients(rows), tiny_tokenizer, max_length, on_long)
        return {each.id: each for each in previews}

    return of


@pytest.fixture
def render(clients: Any, tiny_tokenizer: Any) -> Any:
    """Return a function from a prompt and its answer to the example that a run makes of them."""

    def of(prompt: str, answer: str) -> Any:
        rows = [row("a", prompt, split, answer) for split in ("train", "validation")]
        [example] = FederatedDataset.build(clients(rows), tiny_tokenizer, 1000).train("a")
        return example

    return of


def row(client: str, said: str, split: str = "train", answer: str = "yes") -> dict[str, str]:
    return {"client": client, "prompt": said, "completion": answer, "split": split}


def test_the_pieces_are_the_rendered_text(render: Any, tiny_tokenizer: Any) -> None:
    example = render("Hällo\n?", "Grüß 😀 <|im_end|> dich")
    found = list(pieces(example, tiny_tokenizer))
    assert [piece.supervised for piece in found] == [False, True, False]
    assert found[0].text.endswith("user\nHällo\n?<|im_end|>\n<|im_start|>assistant\n")
    assert found[1].text == "Grüß 😀 <|im_end|> dich<|im_end|>"
    assert found[2].text == "\n"


def test_supervised_tokens_are_told_by_what_leaving_them_off_changes(
    render: Any, tiny_tokenizer: Any
) -> None:
    example = render("Hi", "Hello!")
    marks = supervised(example)
    assert len(marks) == len(example.input_ids)
    assert sum(marks) == example.n_supervised
    kept = [t for t, mark in zip(example.input_ids, marks, strict=True) if mark]
    assert tiny_tokenizer.decode(kept) == "Hello!<|im_end|>"


def test_lengths_are_of_whole_rows_of_every_split(preview: Any, render: Any) -> None:
    rows = client_rows(["alice"], n_rows=8)
    rows[-1]["completion"] += LONG  # a test row
    rows[0]["prompt"] += LONG
    whole = [render(r["prompt"], r["completion"]) for r in rows]
    lengths = sorted(len(example.input_ids) for example in whole)
    counts = sorted(example.n_supervised for example in whole)

    alice = preview(rows)["alice"]

    assert alice.tokens == Spread(lengths[0], (lengths[3] + lengths[4]) / 2, lengths[-1])
    assert alice.supervised == Spread(counts[0], (counts[3] + counts[4]) / 2, counts[-1])
    assert sum(split.rows for split in alice.splits.values()) == 8


def test_cut_and_dropped_rows_are_counted_by_split(preview: Any) -> None:
    rows = [row("a", f"number {i}") for i in range(6)]
    rows += [row("a", "long", answer=LONG), row("a", "long" + LONG)]
    rows += [row("a", "long", "test", LONG), row("a", "long" + LONG, "test"), row("a", "t", "test")]

    splits = preview(rows)["a"].splits

    held = [splits["train"], splits["validation"]]
    assert (sum(s.cut for s in held), sum(s.dropped for s in held)) == (1, 1)
    assert (splits["test"].rows, splits["test"].cut, splits["test"].dropped) == (3, 1, 1)


def test_rows_that_stand_twice_or_in_two_splits_are_counted(preview: Any) -> None:
    rows = [row("a", f"number {i}") for i in range(6)]
    rows += [row("a", "number 3", "test"), *(row("a", "asked", "test") for _ in range(3))]
    rows += [row("b", f"letter {i}") for i in range(6)]
    rows += [row("b", "letter 0"), row("b", "number 3", "test")]

    found = preview(rows)

    a, b = found["a"], found["b"]
    assert a.splits["test"].twice == 2
    assert a.splits["train"].twice == a.splits["validation"].twice == 0
    assert sum(a.across.values()) == 1
    assert {split for pair in a.across for split in pair} <= {"train", "validation", "test"}
    assert b.across == {}
    assert sum(split.twice for split in b.splits.values()) == 1
    assert a.elsewhere == 0
    assert b.elsewhere == (("train", "test") in a.across)


def test_rows_with_the_same_words_but_another_answer_are_different(preview: Any) -> None:
    rows = [row("a", f"number {i}") for i in range(6)] + [row("a", "number 1", "test", "no")]
    assert preview(rows)["a"].across == {}


def test_a_row_of_this_client_and_another_is_not_found_elsewhere_by_itself(preview: Any) -> None:
    rows = [row("a", f"number {i}") for i in range(6)]
    rows += [row("a", f"number {i}", "test") for i in range(6)]
    assert preview(rows)["a"].elsewhere == 0
    rows += [row("b", f"number {i}") for i in range(6)]
    train = preview(rows)["b"].splits["train"].rows
    assert preview(rows)["a"].elsewhere == train > 0


def test_one_client_is_shown_as_it_is_among_all(
    preview: Any, clients: Any, tiny_tokenizer: Any
) -> None:
    rows = [row(client, f"number {i}") for client in ("a", "b", "c") for i in range(6)]
    everybody = preview(rows)
    assert everybody["b"].elsewhere
    assert preview_clients(clients(rows), tiny_tokenizer, 128, shown=["b"]) == [everybody["b"]]


def test_the_example_is_the_first_that_is_trained_on_as_it_is_trained_on(preview: Any) -> None:
    rows = [row("a", f"dropped {i}" + LONG) for i in range(1)]
    rows += [row("a", f"number {i}", answer="so" + LONG) for i in range(6)]
    a = preview(rows)["a"]
    text = "".join(piece.text for piece in a.example)
    assert "dropped" not in text
    assert a.example_cut_from is not None
    assert a.example_cut_from > 128
    assert a.example[-1].supervised  # its end was cut off
    assert "assistant\n" in a.example[0].text
    short = preview([row("a", f"number {i}") for i in range(6)])["a"]
    assert short.example_cut_from is None


def test_a_client_may_have_nothing_left_to_show(preview: Any) -> None:
    a = preview([row("a", f"{i}" + LONG) for i in range(6)])["a"]
    assert a.example == ()
    assert sum(split.dropped for split in a.splits.values()) == 6


def test_rows_that_are_left_out_for_their_length_are_dropped(preview: Any, render: Any) -> None:
    rows = [row("a", "Hi"), row("a", "Hi", "validation"), row("a", "Hi", answer="no " * 50)]
    longest = len(render("Hi", "yes").input_ids)
    [cut, dropped] = (preview(rows[::-1], longest, what)["a"] for what in ("truncate", "drop"))
    assert [(e.cut, e.dropped) for e in (cut.splits["train"], dropped.splits["train"])] == [
        (1, 0),
        (0, 1),
    ]
    assert cut.example_cut_from == len(render("Hi", "no " * 50).input_ids)
    assert dropped.example_cut_from is None
    assert "yes<|im_end|>" in [piece.text for piece in dropped.example]

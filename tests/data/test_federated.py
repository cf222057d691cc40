from pathlib import Path

import pytest

from pfl_lm.data import tokenizing
from pfl_lm.data.content import PromptCompletion, Text
from pfl_lm.data.federated import FederatedDataset
from pfl_lm.data.sources import Record, read_records
from pfl_lm.data.splits import ClientRows, split_clients
from pfl_lm.data.tokenizing import Counts
from pfl_lm.errors import DataError, ModelError
from tests.data.files import Options, write
from tests.data.templates import render
from tests.tiny import make_tokenizer


def rows(client, *completions, split="train", prompt="Hi"):
    return tuple(
        Record(client, split, PromptCompletion(prompt, text), i)
        for i, text in enumerate(completions, 1)
    )


def length(tokenizer, completion):
    return len(render(tokenizer, "Hi", completion).input_ids)


def prefix_length(tokenizer):
    return render(tokenizer, "Hi", "x").spans[0][0]


@pytest.fixture
def decoded(tiny_tokenizer):
    return lambda examples: [
        tiny_tokenizer.decode(e.input_ids[first:last]) for e in examples for first, last in e.spans
    ]


def test_from_a_file_to_examples(clients_jsonl: Path, tiny_tokenizer, decoded):
    records = read_records(Options(str(clients_jsonl), split_column="split"))
    dataset = FederatedDataset.build(split_clients(records, 0.25), tiny_tokenizer, 256)

    assert dataset.client_ids == ("alice", "bob", "carol")
    assert len(dataset) == 3
    for client in dataset:
        assert (client.n_train, len(client.validation)) == (4, 2)
        assert dataset.n_train(client.id) == 4
        assert dataset.counts(client.id, "train") == Counts(4, 4, 0, 0)
        said = decoded(
            dataset.train(client.id) + dataset.validation(client.id) + dataset.test(client.id)
        )
        mine = [
            record.content.completion + "<|im_end|>"
            for record in records
            if record.client == client.id
        ]
        assert sorted(said) == sorted(mine)


def test_equal_tokens_of_all_clients_are_one_object(tiny_tokenizer):
    clients = {c: ClientRows(rows(c, "x", "y"), rows(c, "z"), ()) for c in ("a", "b", "c")}
    dataset = FederatedDataset.build(clients, tiny_tokenizer, 256)
    examples = [e for client in dataset for e in (*client.train, *client.validation)]
    tokens = [token for example in examples for token in example.input_ids]
    assert max(tokens) > 256  # Python itself keeps one object of each smaller one
    assert len({id(token) for token in tokens}) == len(set(tokens))


def test_test_rows_are_tokenized_only_when_asked(tiny_tokenizer, monkeypatch):
    rendered = []

    def spy(tokenizer, content, task):
        rendered.append(content.completion)
        return render(tokenizer, content.prompt, content.completion)

    monkeypatch.setattr(tokenizing, "render", spy)
    data = {"a": ClientRows(rows("a", "one"), rows("a", "two"), rows("a", "three", split="test"))}

    dataset = FederatedDataset.build(data, tiny_tokenizer, 256)
    assert rendered == ["one", "two"]
    assert len(dataset.test("a")) == 1
    assert rendered == ["one", "two", "three"]


def test_a_client_may_have_no_test_rows(tiny_tokenizer):
    data = {"a": ClientRows(rows("a", "one"), rows("a", "two"), ())}
    dataset = FederatedDataset.build(data, tiny_tokenizer, 256)
    assert dataset.test("a") == ()
    assert dataset.counts("a", "test") == Counts(0, 0, 0, 0)


def test_truncated_and_dropped_rows_are_counted(tiny_tokenizer):
    limit = length(tiny_tokenizer, "four")
    long_prompt = Record("a", "train", PromptCompletion("Hi" * 200, "x"), 9)
    data = {
        "a": ClientRows(
            (*rows("a", "four", "five but longer", "xyz"), long_prompt, long_prompt),
            (*rows("a", "far too long for it"), long_prompt),
            (long_prompt, *rows("a", "ok", "too long again", "as is this")),
        )
    }
    dataset = FederatedDataset.build(data, tiny_tokenizer, limit)

    assert dataset.counts("a", "train") == Counts(rows=5, kept=3, truncated=1, dropped=2)
    assert dataset.counts("a", "validation") == Counts(rows=2, kept=1, truncated=1, dropped=1)
    assert dataset.counts("a", "test") == Counts(rows=4, kept=3, truncated=2, dropped=1)
    assert dataset.n_train("a") == 3
    assert len(dataset.test("a")) == 3
    assert all(len(e.input_ids) <= limit and e.n_supervised for e in dataset.train("a"))


def test_one_supervised_token_is_enough_and_none_is_not(tiny_tokenizer):
    data = {"a": ClientRows(rows("a", "one"), rows("a", "two"), ())}
    first = prefix_length(tiny_tokenizer)
    dataset = FederatedDataset.build(data, tiny_tokenizer, first + 1)
    assert [e.n_supervised for e in dataset.train("a")] == [1]
    with pytest.raises(DataError):
        FederatedDataset.build(data, tiny_tokenizer, first)


def test_clients_left_with_nothing_to_learn_are_all_named(tiny_tokenizer):
    fine = rows("x", "short", prompt="")
    long = rows("x", *["answer"] * 14, prompt="long " * 90)
    data = {
        "carol": ClientRows(long, fine, ()),
        "alice": ClientRows(fine, fine, ()),
        "bob": ClientRows(long[:3], long[:2], long),
    }
    with pytest.raises(DataError) as caught:
        FederatedDataset.build(data, tiny_tokenizer, 96)
    assert str(caught.value) == (
        "data: 3 problems\n"
        "  client 'bob': 0 of 3 train rows keep a supervised token at max_length 96\n"
        "  client 'bob': 0 of 2 validation rows keep a supervised token at max_length 96\n"
        "  client 'carol': 0 of 14 train rows keep a supervised token at max_length 96\n"
        "  hint: raise data.max_length, or shorten these clients' prompts"
    )


def test_clients_come_sorted_whatever_the_order_given(tiny_tokenizer):
    part = ClientRows(rows("x", "one"), rows("x", "two"), ())
    data = {"b": part, "a": part, "B": part}
    dataset = FederatedDataset.build(data, tiny_tokenizer, 256)
    assert dataset.client_ids == ("B", "a", "b")
    assert [client.id for client in dataset] == ["B", "a", "b"]


def test_a_row_the_template_refuses_is_named():
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    data = {"a": ClientRows(rows("a", "good", "bad"), rows("a", "good"), ())}
    with pytest.raises(DataError) as caught:
        FederatedDataset.build(data, tokenizer, 64)
    assert caught.value.message == "line 2 (client 'a'): the chat template refuses this row: no"


def test_the_tokenizer_is_checked_before_any_row():
    with pytest.raises(ModelError, match="no chat template"):
        FederatedDataset.build({}, make_tokenizer(template=None), 64)


TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Nothing"},
]


def test_conversations_from_a_file_to_examples(tmp_path, tiny_tokenizer, decoded):
    options = write(tmp_path, *[{"client": "a", "messages": talk} for talk in (TALK, TALK[:2])])
    data = split_clients(read_records(options), 0.5)
    dataset = FederatedDataset.build(data, tiny_tokenizer, 256)
    examples = dataset.train("a") + dataset.validation("a")
    long, short = sorted(examples, key=lambda example: -len(example.spans))
    assert decoded([long]) == ["Hello<|im_end|>", "Nothing<|im_end|>"]
    assert decoded([short]) == ["Hello<|im_end|>"]

    cut = FederatedDataset.build(data, tiny_tokenizer, long.spans[1][0])
    assert sorted(decoded(cut.train("a") + cut.validation("a"))) == ["Hello<|im_end|>"] * 2
    counts = [cut.counts("a", split) for split in ("train", "validation")]
    assert sorted(count.truncated for count in counts) == [0, 1]


def test_texts_from_a_file_to_examples(tmp_path, decoded):
    options = write(tmp_path, *[{"client": "a", "text": text} for text in ("the end", "the sea")])
    data = split_clients(read_records(options), 0.5)
    dataset = FederatedDataset.build(data, make_tokenizer(template=None), 256)
    said = decoded(dataset.train("a") + dataset.validation("a"))
    assert sorted(said) == [" end<|im_end|>", " sea<|im_end|>"]


def test_texts_need_a_token_that_ends_them():
    part = ClientRows((Record("a", "train", Text("x"), 1),), (), ())
    with pytest.raises(ModelError, match="has no end-of-text token"):
        FederatedDataset.build({"a": part}, make_tokenizer(eos=None), 64)


def test_a_row_of_a_table_is_named_as_such():
    tokenizer = make_tokenizer("{{ raise_exception('no') }}")
    part = ClientRows((Record("a", "train", PromptCompletion("p", "c"), 3, "row"),), (), ())
    with pytest.raises(DataError) as caught:
        FederatedDataset.build({"a": part}, tokenizer, 64)
    assert caught.value.message == "row 3 (client 'a'): the chat template refuses this row: no"


def mixed(tokenizer):
    """Rows of which some are longer than the limit, and the limit."""
    limit = prefix_length(tokenizer) + 5
    data = {
        "a": ClientRows(rows("a", "four", "far too long"), rows("a", "xyz"), rows("a", "x" * 9))
    }
    return data, limit


def test_rows_that_are_too_long_can_be_left_out(tiny_tokenizer, decoded):
    data, limit = mixed(tiny_tokenizer)
    dataset = FederatedDataset.build(data, tiny_tokenizer, limit, "drop")
    assert decoded(dataset.train("a")) == ["four<|im_end|>"]
    assert dataset.counts("a", "train") == Counts(rows=2, kept=1, truncated=0, dropped=0, long=1)
    assert dataset.test("a") == ()
    assert dataset.counts("a", "test") == Counts(rows=1, kept=0, truncated=0, dropped=0, long=1)


def test_a_client_whose_rows_are_all_left_out_is_named(tiny_tokenizer):
    data, limit = mixed(tiny_tokenizer)
    data["a"] = ClientRows(data["a"].train, data["a"].test, ())
    with pytest.raises(DataError) as caught:
        FederatedDataset.build(data, tiny_tokenizer, limit, "drop")
    expected = f"client 'a': all 1 validation rows are longer than max_length {limit}, and dropped"
    assert expected in caught.value.message


def test_rows_that_are_too_long_can_be_an_error(tiny_tokenizer):
    data, limit = mixed(tiny_tokenizer)
    with pytest.raises(DataError) as caught:
        FederatedDataset.build(data, tiny_tokenizer, limit, "error")
    long, test = length(tiny_tokenizer, "far too long"), length(tiny_tokenizer, "x" * 9)
    assert caught.value.message.splitlines() == [
        f"data.on_long is error, data.max_length {limit}, and some rows are longer: 2 problems",
        f"  line 2 (client 'a'): {long} tokens",
        f"  line 1 (client 'a'): {test} tokens",
    ]
    whole = FederatedDataset.build(data, tiny_tokenizer, long, "error")
    assert whole.counts("a", "train").truncated == 0

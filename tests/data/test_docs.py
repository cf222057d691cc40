"""docs/data.md: its examples can be read, and every message in it is one that pfl-lm gives."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pfl_lm.data.content import Conversation, PromptCompletion, Text
from pfl_lm.data.federated import FederatedDataset
from pfl_lm.data.population import read_population
from pfl_lm.data.records import Record
from pfl_lm.data.render import render
from pfl_lm.data.sources import read_records
from pfl_lm.data.splits import ClientRows
from pfl_lm.errors import PflError
from pfl_lm.recipe.data import DataOptions
from pfl_lm.recipe.partition import PartitionOptions
from pfl_lm.recipe.task import Task
from tests.data.files import GOOD, Options, write
from tests.data.templates import TOKENIZERS
from tests.data.test_turns import FORGETFUL, TALK, turns
from tests.tiny import make_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
MESSAGES = [
    each.strip("`")
    for each in re.findall(r"^\| (`.+?`+) \| .* \|$", PAGE.partition("## What is refused")[2], re.M)
]
TEXT = {"client": "a", "text": "x"}
SPLIT = {"split_column": "split"}
HUMAN = {"from": "human", "value": "Hi"}
ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def underlined(block):
    """What stands over the wavy lines of a block."""
    lines = block.splitlines()
    return [
        above[wave.start() : wave.end()]
        for above, line in pairwise(lines)
        for wave in re.finditer("~+", line)
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: list(row)[-1])
def test_every_example_is_a_row(tmp_path, row):
    [record] = read_records(write(tmp_path, row))
    assert record.client == "alice"


@pytest.mark.parametrize(
    ("i", "names"),
    [*((i, ["chatml"]) for i in range(4)), (4, ["llama-3", "chatml"])],
)
def test_what_is_underlined_is_what_is_learnt(tmp_path, i, names):
    block = re.findall(r"```\n([^`]*~[^`]*)```", PAGE)[i]
    [record] = read_records(write(tmp_path, ROWS[i]))
    said = []
    for name in names:
        tokenizer = TOKENIZERS[name]
        example = render(tokenizer, record.content)
        said += [tokenizer.decode(example.input_ids[i:j]) for i, j in example.spans]
    if i == 4:  # the small tokenizers write "It" as two tokens
        assert [underlined(block)[0], f"t{underlined(block)[1]}"] == said
    else:
        assert underlined(block) == said


def test_the_label_is_what_is_learnt(tmp_path):
    from tests.tasks.worlds import word_tokenizer

    block = re.findall(r"```\n([^`]*~[^`]*)```", PAGE)[5]
    options = write(tmp_path, ROWS[5])
    options.format = "text_label"
    [record] = read_records(options)
    example = render(word_tokenizer(), record.content, Task("sequence_classification", ("fruit",)))
    assert underlined(block) == [record.content.label] == ["fruit"]
    assert example.n_supervised == 1
    assert example.ending == 1


def refused(options):
    with pytest.raises(PflError) as caught:
        read_population(options)
    return str(caught.value)


def talk(*messages):
    return {"client": "a", "messages": list(messages)}


def side(split, **more):
    return TEXT | {"split": split} | more


LINES = [
    ([GOOD, {"client": "a", "completion": "c"}], {}),
    ([TEXT], {"client_column": "speaker"}),
    ([{"client": "a", "body": "x"}], {}),
    ([{"client": "a", "body": "x"}], {"columns": {"boddy": "text"}}),
    ([TEXT | {"body": "x"}], {"columns": {"body": "text"}}),
    ([{"client": "a", "conversations": [HUMAN, {"from": "bot", "value": "x"}]}], {}),
    ([GOOD | TEXT], {}),
    ([GOOD | {"response": "c"}], {}),
    ([TEXT | {"text": ""}, TEXT | {"text": None}], {}),
    ([talk(ASK), talk(SAY, ASK, SAY)], {}),
    ([talk(ASK, {"role": "gpt", "content": "x"})], {}),
    ([talk(ASK, SAY | {"tool_calls": []})], {}),
    ([{"client": "a", "messages": "[]"}], {}),
    ([TEXT, TEXT | {"client": None}], {}),
    ([TEXT | {"client": "x" * 10_001}], {}),
    ([talk(*[ASK, SAY] * 501)], {}),
    ([TEXT, TEXT | {"text": "y"}], {"holdout_clients": ["bob"]}),
    ([TEXT, TEXT | {"text": "y"}], {"holdout_clients": 1}),
    ([TEXT] * 2, {"min_train_samples": 5}),
    ([TEXT], {"partition": PartitionOptions(name="natural_id", partition_by="topic")}),
    ([TEXT], {"partition": PartitionOptions(name="iid", num_partitions=10)}),
    ([TEXT | {"client": 1}, TEXT | {"client": "1"}], {}),
    ([side("dev")], SPLIT),
    ([side("train"), side("test")], {}),
    (["{", b'{"client": "a", "text": "\xff"}'], {}),
    ([side("test")], SPLIT),
    ([side("train"), side("train", client="b"), side("validation", client="b")], SPLIT),
    ([side("train", doc="d1"), side("test", doc="d1")], SPLIT | {"group_column": "doc"}),
    ([TEXT | {"doc": "d1"}] * 2, {"group_column": "doc"}),
    ([TEXT], {}),
]
CSVS = ["client,text\na,b,c\n", 'client,text\na,"b\n']


def folders(tmp_path):
    row = json.dumps(TEXT)
    for name in ("strange", "other"):
        (tmp_path / name).mkdir()
    strange = tmp_path / "strange"
    for name in ("README.md", ".hidden.jsonl", "a.jsonl", "a.json", "b.csv"):
        (strange / name).write_text(row)
    (strange / "more").mkdir()
    (strange / "out.jsonl").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "alice.jsonl").write_text(json.dumps(TEXT | {"client": "bob"}))
    return [strange, tmp_path / "other"]


def test_every_message_is_given(tmp_path):
    given = [str(template_refusal()), str(tokenizer_refusal())]
    given += [str(too_long("error")), str(too_long("drop"))]
    for rows, settings in LINES:
        options = write(tmp_path, *rows)
        vars(options).update(settings)
        given.append(refused(options))
    for content in CSVS:
        (tmp_path / "rows.csv").write_text(content)
        given.append(refused(Options(str(tmp_path / "rows.csv"))))
    given.append(refused(Options(str(bomb(tmp_path)))))
    given += [refused(Options(str(folder))) for folder in folders(tmp_path)]
    one = PartitionOptions(name="iid", num_partitions=1)
    given.append(refused(Options(str(tmp_path / "other"), partition=one)))
    for source in (
        {"package": "no_such_rows", "data_file": "rows.jsonl"},
        {"package": "pfl_lm", "data_file": "rows.jsonl"},
        {"dataset_name": "org/nowhere"},
    ):
        given.append(refused(DataOptions(**source)))
    assert len(MESSAGES) > 30
    # With "a.jsonl" and "a.json" of one kind there, the kinds are named by the first of each.
    told = "\n".join(given).replace("('a.json')", "('a.jsonl')")
    assert [message for message in MESSAGES if message not in told] == []


def bomb(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"client": ["a"], "text": ["x" * 2**28]})
    pyarrow.parquet.write_table(
        table, tmp_path / "rows.parquet", compression="zstd", use_dictionary=False
    )
    return path


def template_refusal():
    with pytest.raises(PflError) as caught:
        render(make_tokenizer(FORGETFUL), Conversation(turns(*TALK)))
    return caught.value


def too_long(on_long):
    row = Record("a", "train", PromptCompletion("p", "c" * 30), 1)
    rows = {"a": ClientRows((row,), (row,), ())}
    with pytest.raises(PflError) as caught:
        FederatedDataset.build(rows, make_tokenizer(), 60, on_long)
    return caught.value


def tokenizer_refusal():
    with pytest.raises(PflError) as caught:
        render(make_tokenizer(eos=None), Text("x"))
    return caught.value

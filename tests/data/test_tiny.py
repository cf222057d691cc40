import socket

import pytest
import yaml

from tests.tiny import client_rows, tiny_recipe


def test_the_tiny_backbone_loads_as_any_other(tiny_model_dir, tiny_tokenizer):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    text = "<|im_start|>user\nthe 🦊 in  there\n\n<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert AutoConfig.from_pretrained(tiny_model_dir).vocab_size == len(tokenizer)


def test_a_recipe_takes_dotted_changes(tmp_path):
    path = tiny_recipe(tmp_path, **{"training.max_steps": 9, "adapter.r": 4, "name": "other"})
    recipe = yaml.safe_load(path.read_text())
    assert recipe["training"]["max_steps"] == 9
    assert recipe["adapter"] == {"r": 4}
    assert recipe["name"] == "other"
    assert recipe["federation"] == {"rounds": 2}


def test_clients_have_words_of_their_own():
    words = {}
    for row in client_rows():
        words.setdefault(row["client"], set()).update(row["completion"].split())
    shared = {"The", "and", "then", "of", "the"} | {str(i) for i in range(8)}
    alice, bob, carol = ({w.strip(",.") for w in said} - shared for said in words.values())
    assert not alice & bob
    assert not bob & carol


def test_no_test_reaches_the_network(no_network):
    with socket.socket() as away, pytest.raises(pytest.fail.Exception, match=r"192\.0\.2\.1:443"):
        away.connect(("192.0.2.1", 443))
    with pytest.raises(pytest.fail.Exception, match=r"huggingface\.co"):
        socket.getaddrinfo("huggingface.co", 443)
    assert no_network == ["192.0.2.1:443", "huggingface.co"]
    no_network.clear()  # else the guard fails this test at its end, as it should


def test_this_machine_may_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()

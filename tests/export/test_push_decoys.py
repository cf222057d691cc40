"""What must never leave a run folder, and files that are not what they seem."""

from __future__ import annotations

import base64
import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest

from tests.export.fake_hub import TOKEN, FakeHub
from tests.export.pushing import REPO, committed_content, of_clients, push


def test_tokenizer_files_go_along_and_nothing_else_does(run_folder: Path, hub: FakeHub) -> None:
    folder = run_folder / "adapters" / "alice"
    allowed = ["tokenizer.json", "chat_template.jinja"]
    for name in [*allowed, "training_args.bin", "notes.txt", "optimizer.safetensors", ".env"]:
        (folder / name).write_text(f"this is {name}")

    push(run_folder, "--clients", "alice")

    extra = {f"clients/alice/{name}" for name in allowed}
    assert set(hub.repos[REPO].files) == of_clients("alice") | extra


def test_planted_decoys_never_leave(run_folder: Path, tmp_path: Path, hub: FakeHub) -> None:
    secret = tmp_path / "outside"
    secret.write_text("DECOY outside")
    decoys = [
        run_folder / name
        for name in (
            ".env",
            "notes.json",
            "adapters/.env",
            "adapters/rows.jsonl",
            "adapters/alice/.env",
            "adapters/alice/state-2.safetensors",
            "adapters/alice/federation.sqlite",
            "adapters/alice/clients.jsonl",
            "adapters/alice/checkpoint/adapter_model.safetensors",
            "adapters/nobody/adapter_model.safetensors",
            "clients/alice/adapter_model.safetensors",
        )
    ]
    for decoy in decoys:
        decoy.parent.mkdir(parents=True, exist_ok=True)
        decoy.write_text(f"DECOY {decoy.name}")
    (run_folder / "adapters" / "alice" / "link.json").symlink_to(secret)
    private = [run_folder / "federation.sqlite", run_folder / "recipe.yaml"]
    private += sorted(run_folder.glob("clients/*/state-*.safetensors"))
    private += sorted(run_folder.glob("server/*.safetensors"))
    assert len(private) >= 6

    code, _, _ = push(run_folder)

    assert code == 0
    sent = b"\n".join(f"{r.line}\n{r.headers}\n".encode() + r.body for r in hub.received)
    sent += b"\n".join(base64.b64decode(content) for content in committed_content(hub))
    assert b"DECOY" not in sent
    assert str(tmp_path).encode() not in sent
    assert b"sqlite" not in sent.lower()
    for file in private:
        content = file.read_bytes()
        assert content not in sent, file
        assert content[-200:] not in sent, file
        assert hashlib.sha256(content).hexdigest().encode() not in sent, file
    assert sent.count(TOKEN.encode()) == sum(
        request.headers.get("authorization") == f"Bearer {TOKEN}" for request in hub.received
    )


@pytest.mark.parametrize(
    "name",
    [
        "adapters.json",
        "adapters",
        "adapters/alice",
        "adapters/alice/adapter_model.safetensors",
        "adapters/alice/adapter_config.json",
        "adapters/alice/README.md",
        "adapters/alice/tokenizer.json",
    ],
)
def test_links_are_refused(name: str, run_folder: Path, tmp_path: Path, hub: FakeHub) -> None:
    real = run_folder / name
    elsewhere = tmp_path / "elsewhere"
    if real.exists():
        real.rename(elsewhere)
    else:
        elsewhere.write_text("DECOY")
    real.symlink_to(elsewhere)

    code, _, stderr = push(run_folder)

    assert (code, hub.sent()) == (2, [])
    assert "links in a run folder are not followed" in stderr


def test_the_run_folder_may_be_a_link(run_folder: Path, tmp_path: Path, hub: FakeHub) -> None:
    (tmp_path / "link").symlink_to(run_folder)

    assert push(tmp_path / "link")[0] == 0


def test_an_adapter_that_is_not_the_indexs_is_refused(run_folder: Path, hub: FakeHub) -> None:
    weights = run_folder / "adapters" / "bob" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    code, _, stderr = push(run_folder)

    assert (code, hub.sent()) == (2, [])
    assert stderr.startswith(
        f"{weights}: not the adapter that adapters.json names (SHA-256 differs)\n"
    )


def test_a_missing_adapter_is_named(run_folder: Path, hub: FakeHub) -> None:
    (run_folder / "adapters" / "bob" / "adapter_config.json").unlink()

    code, _, stderr = push(run_folder)

    assert (code, hub.sent()) == (2, [])
    assert "adapters/bob/adapter_config.json: cannot be read: No such file" in stderr


def test_a_base_model_that_is_a_folder_is_not_told(
    run_folder: Path, tmp_path: Path, hub: FakeHub
) -> None:
    index = json.loads((run_folder / "adapters.json").read_text())
    index["base"]["model_name_or_path"] = str(tmp_path / "my-model")
    (run_folder / "adapters.json").write_text(json.dumps(index))
    config_file = run_folder / "adapters" / "alice" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "m")}))

    assert push(run_folder, "--clients", "alice")[0] == 0

    files = hub.repos[REPO].files
    sent = json.loads(files["clients/alice/adapter_config.json"])
    assert sent == config | {"base_model_name_or_path": None, "revision": None}
    assert json.loads(files["adapters.json"])["base"]["model_name_or_path"] is None
    assert b"path/of/the/base/model" in files["clients/alice/README.md"]
    assert b"base_model:" not in files["README.md"]
    assert str(tmp_path).encode() not in b"".join(files.values())
    hub.forget()
    push(run_folder, "--clients", "alice")
    assert hub.sent() == []


@pytest.mark.parametrize(
    "value",
    [*("[" * n + "]" * n for n in range(50, 1000, 50)), "NaN", "-Infinity", "1e999", "9" * 5000],
)
def test_a_config_that_cannot_go_out_without_its_folder(
    value: str, run_folder: Path, hub: FakeHub
) -> None:
    config = run_folder / "adapters" / "bob" / "adapter_config.json"
    config.write_text(f'{{"base_model_name_or_path": "/a/folder", "x": {value}}}')

    code, _, stderr = push(run_folder, "--clients", "bob", "--dry-run")

    if code:
        assert (code, stderr) == (2, f"{config}: not a JSON object\n")
    else:
        assert value.startswith("[")
    assert hub.sent() == []


def test_a_large_adapter_is_looked_at_in_pieces(run_folder: Path, hub: FakeHub) -> None:
    weights = run_folder / "adapters" / "bob" / "adapter_model.safetensors"
    with weights.open("wb") as file:
        file.truncate(9 * 2**30)

    code, _, stderr = push(run_folder, "--dry-run")

    assert (code, hub.sent()) == (2, [])
    assert f"{weights}: larger than 8589934592 bytes\n" in stderr

    with weights.open("wb") as file:
        file.truncate(2**28)
    tracemalloc.start()
    code, _, stderr = push(run_folder, "--dry-run")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert code == 2
    assert "SHA-256 differs" in stderr
    assert peak < 2**26

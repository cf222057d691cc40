"""What every test can count on: no network, one thread, and a tiny backbone to work with."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Read at import by the libraries under test, hence set before any of them is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.tiny import client_rows, make_tokenizer, tiny_model, write_jsonl

# A shared machine may stall at any moment: no example fails for being slow.
hypothesis.settings.register_profile("pfl-lm", deadline=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=3000)
hypothesis.settings.load_profile("pfl-lm")


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """The folder of a two-layer random Llama with its tokenizer. Read it, do not write to it."""
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The tiny backbone's tokenizer, as it is before saving. Do not change it."""
    return make_tokenizer()


@pytest.fixture
def clients_jsonl(tmp_path: Path) -> Path:
    """A file of three clients with words of their own, eight rows each, two of them for testing."""
    return write_jsonl(tmp_path / "clients.jsonl", client_rows())


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keep PyTorch to one thread if it is loaded, without loading it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Fail a test that reaches for another machine, even if the code under test hides the error."""
    if request.node.get_closest_marker("network"):
        yield []
        return
    attempts: list[str] = []

    def guard(host: object, reach: str) -> None:
        if not _loopback(host):
            attempts.append(reach)
            pytest.fail(f"a test without the `network` mark reached for {reach}")

    def guarded(method: Callable[[socket.socket, Any], Any]) -> Callable[..., Any]:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                guard(address[0], f"{address[0]}:{address[1]}")
            return method(self, address)

        return call

    lookup = socket.getaddrinfo

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        guard(host, str(host))
        return lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", guarded_lookup)
    yield attempts
    if attempts:
        pytest.fail(f"a test without the `network` mark reached for {', '.join(attempts)}")


def _loopback(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(str(name))
    except ValueError:
        return name == socket.gethostname()
    return address.is_loopback or address.is_unspecified

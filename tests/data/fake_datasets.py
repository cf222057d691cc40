"""A Hub on 127.0.0.1 with a few datasets, and the command line against it in a process of its own.

``datasets`` reads where the Hub is when it is imported, hence the process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from tests.export.fake_hub import git_sha1

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD = "89abcdef0123456789abcdef0123456789abcdef"


class DatasetHub(ThreadingHTTPServer):
    """Datasets by name, each with its files by revision; ``gated`` ones are shown to nobody."""

    daemon_threads = True

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.unhandled: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, name: str, files: Mapping[str, bytes], revision: str = COMMIT) -> None:
        self.files.setdefault(name, {})[revision] = dict(files)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DatasetHub

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlparse(self.path).path)
        found = re.fullmatch(
            r"(?:/api)?/datasets/([\w.-]+/[\w.-]+)(?:/(resolve|revision|paths-info|tree)/([^/]+)/?(.*))?",
            path,
        )
        if found is None:
            self.server.unhandled.append(f"{self.command} {path}")
            return self.error(404, "NotFound")
        name, what, revision, inside = found.groups()
        if name not in self.server.files:
            return self.error(401, "RepoNotFound")
        if name in self.server.gated and what == "resolve":
            return self.error(401, "GatedRepo")
        commit = COMMIT if revision in (None, "main") else revision
        files = self.server.files[name].get(commit)
        if files is None:
            return self.error(404, "RevisionNotFound")
        if what == "resolve":
            if inside not in files:
                return self.error(404, "EntryNotFound", X_Repo_Commit=commit)
            etag = f'"{git_sha1(files[inside])}"'
            return self.send(files[inside], ETag=etag, X_Repo_Commit=commit)
        if what == "paths-info":
            asked = set(re.findall(r"paths=([^&]*)", body.decode())) or set(
                json.loads(body or b"{}").get("paths", [])
            )
            asked = {unquote(path) for path in asked}
            return self.send([self.listed(p, c) for p, c in files.items() if p in asked])
        if what == "tree":
            return self.tree(files, inside)
        siblings = [{"rfilename": path} for path in files]
        return self.send({"_id": name, "id": name, "sha": commit, "siblings": siblings, "tags": []})

    do_GET = do_POST = do_HEAD = answer  # noqa: N815

    def tree(self, files: Mapping[str, bytes], folder: str) -> None:
        inside = {p: c for p, c in files.items() if p.startswith(f"{folder}/" if folder else "")}
        folders = {p.rpartition("/")[0] for p in inside} - {"", folder}
        if folder and not inside:
            return self.error(404, "EntryNotFound")
        page = [self.listed(path, content) for path, content in inside.items()]
        page += [{"type": "directory", "path": f, "oid": "0" * 40} for f in folders]
        return self.send(page)

    def listed(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}

    def send(self, content: bytes | Any, status: int = 200, **headers: str) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(raw)), **named}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def error(self, status: int, code: str, **headers: str) -> None:
        self.send({"error": code}, status, X_Error_Code=code, **headers)


TELL = """
import json, sys
from pathlib import Path
from pfl_lm.errors import PflError
from pfl_lm.preflight import check_recipe

def told(overrides):
    try:
        clients = check_recipe(Path(sys.argv[1]), overrides).clients
    except PflError as error:
        return str(error)
    return {c: [len(r.train), len(r.validation), len(r.test)] for c, r in clients.items()}

print(json.dumps({name: told(overrides) for name, overrides in json.load(sys.stdin).items()}))
"""


def told(
    recipe: Path, cases: Mapping[str, list[str]], home: Path, endpoint: str | None = None
) -> dict[str, Any]:
    """Check a recipe with each list of overrides: the error's text, or the clients' row counts.

    One process for all, with ``endpoint`` as its Hub, or offline.
    """
    done = _run([sys.executable, "-c", TELL, str(recipe)], json.dumps(cases), home, endpoint)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def command(
    *arguments: str, home: Path, endpoint: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``pfl-lm`` with ``endpoint`` as its Hub, or offline."""
    return _run([sys.executable, "-m", "pfl_lm", *arguments], "", home, endpoint)


def _run(
    arguments: list[str], given: str, home: Path, endpoint: str | None
) -> subprocess.CompletedProcess[str]:
    known = {"HF_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    where = {"HF_HUB_OFFLINE": "1"} if endpoint is None else {"HF_ENDPOINT": endpoint}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        arguments,
        input=given,
        capture_output=True,
        text=True,
        env={**inherited, **known, **where},
        cwd=home.parent,
    )

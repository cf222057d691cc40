"""A Hub on 127.0.0.1 that answers what huggingface_hub asks in a push and in a download.

It keeps every request with its body, so that a test can say what was never sent, and can be told to
refuse, or to hang up, at any request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import yaml

OWNER, TOKEN = "me", "hf_of_me_and_nobody_else"
LFS_SUFFIXES = (".safetensors", ".model")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Fault:
    pattern: str
    status: int | None
    headers: dict[str, str]
    left: int
    skip: int
    after: bool


@dataclass
class Repo:
    private: bool
    head: str
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class FakeHub(ThreadingHTTPServer):
    """A Hub with one account, ``me``, whose token may write there and in ``an-org``."""

    daemon_threads = True

    def __init__(self) -> None:
        self.accounts: dict[str, dict[str, Any]] = {TOKEN: account()}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.received: list[Request] = []
        self.unhandled: list[str] = []
        self.faults: list[Fault] = []
        self.page_size = 1000
        self.naps: list[float] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def refuse(
        self, pattern: str, status: int, *, times: int = 1, skip: int = 0, **headers: str
    ) -> None:
        """Answer requests whose ``METHOD /path`` has ``pattern`` with an error, without effect."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(pattern, status, named, times, skip, after=False))

    def hang_up(self, pattern: str, *, times: int = 1, skip: int = 0, after: bool = False) -> None:
        """Close the connection at a request; ``after`` it has had its effect, or before."""
        self.faults.append(Fault(pattern, None, {}, times, skip, after))

    def sent(self) -> list[Request]:
        """Return the requests so far that could have changed something."""
        return [request for request in self.received if request.method not in ("GET", "HEAD")]

    def forget(self) -> None:
        """Start a new log."""
        self.received.clear()

    def add_repo(self, name: str, files: dict[str, bytes], *, private: bool = True) -> Repo:
        repo = self.repos[name] = Repo(private, hashlib.sha1(name.encode()).hexdigest())
        repo.files = {".gitattributes": b"*.safetensors filter=lfs\n", **files}
        return repo

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client hung up first


def account(role: str = "write", **orgs: str) -> dict[str, Any]:
    orgs = orgs or {"an-org": "write"}
    return {
        "type": "user",
        "name": OWNER,
        "orgs": [{"name": name, "roleInOrg": of_org} for name, of_org in orgs.items()],
        "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": role}},
    }


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self) -> None:
        hub = self.server
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self.read_body())
        hub.received.append(request)
        fault = next((f for f in hub.faults if re.search(f.pattern, request.line)), None)
        if fault is not None and fault.skip:
            fault.skip -= 1
            fault = None
        if fault is not None:
            fault.left -= 1
            if not fault.left:
                hub.faults.remove(fault)
            if fault.status is not None:
                self.error(fault.status, "", "refused for a test", **fault.headers)
                return
            if not fault.after:
                self.drop()
                return
        self.silent = fault is not None
        route = urlparse(self.path)
        path = unquote(route.path)
        for pattern, handle in ROUTES:
            if found := re.fullmatch(pattern, path):
                handle(self, request, *found.groups(), **{"query": parse_qs(route.query)})
                return
        hub.unhandled.append(request.line)
        self.error(404, "NotFound", path)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer  # noqa: N815

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while n := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, content: bytes | Any, status: int = 200, **headers: str) -> None:
        if self.silent:
            self.drop()
            return
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Type": kind, "Content-Length": str(len(raw)), **named}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    silent = False

    def error(self, status: int, code: str, message: str, **headers: str) -> None:
        about = {"X_Error_Code": code, "X_Error_Message": message} if code else {}
        self.send({"error": message}, status, **about, **headers)

    def account(self) -> dict[str, Any] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.server.accounts.get(token)

    def may(self, owner: str, *, write: bool) -> bool:
        who = self.account()
        if who is None or (write and who["auth"]["accessToken"]["role"] == "read"):
            return False
        roles = {who["name"]: "admin"} | {o["name"]: o["roleInOrg"] for o in who["orgs"]}
        return owner in roles and not (write and roles[owner] == "read")

    def allowed(self, name: str, *, write: bool = False) -> Repo | None:
        """Return the repository, or answer as the Hub does if this token may not go there."""
        if self.headers.get("Authorization") and self.account() is None:
            self.error(401, "", "Invalid credentials in Authorization header")
            return None
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.may(name.split("/")[0], write=False)):
            status = 404 if self.account() else 401
            self.error(status, "RepoNotFound", "Repository not found")
            return None
        if write and not self.may(name.split("/")[0], write=True):
            self.error(403, "", "You don't have the required permissions")
            return None
        return repo

    # One method for each thing that is asked.

    def whoami(self, request: Request, query: Any) -> None:
        who = self.account()
        self.send(who) if who else self.error(401, "", "Invalid username or password.")

    def create(self, request: Request, query: Any) -> None:
        asked = json.loads(request.body)
        owner = asked.get("organization") or OWNER
        name = f"{owner}/{asked['name']}"
        if not self.may(owner, write=True):
            return self.error(403, "", f"You don't have the rights to create a model under {owner}")
        url = f"{self.server.url}/{name}"
        if name in self.server.repos:
            return self.send({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.add_repo(name, {}, private=bool(private))
        return self.send({"url": url, "name": name, "id": name})

    def validate_yaml(self, request: Request, query: Any) -> None:
        text = json.loads(request.body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        ok = found is not None and isinstance(yaml.safe_load(found[1]), dict)
        errors = [] if ok else [{"message": "no metadata"}]
        self.send({"errors": errors, "warnings": []}, 200 if ok else 400)

    def info(self, request: Request, name: str, query: Any) -> None:
        if repo := self.allowed(name):
            siblings = [{"rfilename": path} for path in repo.files]
            about = {"id": name, "modelId": name, "sha": repo.head, "private": repo.private}
            self.send({"_id": name, "tags": [], "siblings": siblings, **about})

    def tree(self, request: Request, name: str, folder: str | None, query: Any) -> None:
        repo = self.allowed(name)
        if repo is None:
            return
        if folder:
            self.error(404, "EntryNotFound", "no such folder in any repository here")
            return
        start = int(query.get("cursor", ["0"])[0])
        stop = start + self.server.page_size
        page = [self.listed(path, repo.files[path]) for path in sorted(repo.files)[start:stop]]
        folders = {path.rpartition("/")[0] for path in repo.files} - {""}
        if start == 0:
            page += [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in folders]
        url = f"{self.server.url}{urlparse(self.path).path}?recursive=true&cursor={stop}"
        more = {"Link": f'<{url}>; rel="next"'} if stop < len(repo.files) else {}
        self.send(page, 200, **more)

    def listed(self, path: str, content: bytes) -> dict[str, Any]:
        about: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
        if not path.endswith(LFS_SUFFIXES):
            return about | {"oid": git_sha1(content)}
        oid = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs\noid sha256:{oid}\nsize {len(content)}\n".encode()
        lfs = {"oid": oid, "size": len(content), "pointerSize": len(pointer)}
        return about | {"oid": git_sha1(pointer), "lfs": lfs}

    def preupload(self, request: Request, name: str, query: Any) -> None:
        if self.allowed(name, write=True):
            asked = json.loads(request.body)["files"]
            modes = {f["path"]: f["path"].endswith(LFS_SUFFIXES) for f in asked}
            files = [
                {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
                for path, lfs in modes.items()
            ]
            self.send({"files": files})

    def lfs_batch(self, request: Request, name: str, query: Any) -> None:
        if not self.allowed(name, write=True):
            return
        objects = json.loads(request.body)["objects"]
        for each in objects:
            if each["oid"] not in self.server.blobs:
                upload = {"href": f"{self.server.url}/lfs/{each['oid']}"}
                verify = {"href": f"{self.server.url}/lfs-verify"}
                each["actions"] = {"upload": upload, "verify": verify}
        self.send({"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, oid: str, query: Any) -> None:
        if hashlib.sha256(request.body).hexdigest() != oid:
            return self.error(400, "", "another file")
        self.server.blobs[oid] = request.body
        return self.send({})

    def lfs_verify(self, request: Request, query: Any) -> None:
        self.send({})

    def commit(self, request: Request, name: str, query: Any) -> None:
        repo = self.allowed(name, write=True)
        if repo is None:
            return
        lines = [json.loads(line) for line in request.body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, repo.head):
            self.error(412, "", "A commit has happened since. Please refresh and try again.")
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.blobs[value["oid"]]
        repo.head = hashlib.sha1(repo.head.encode() + request.body).hexdigest()
        repo.commits.append(header["summary"])
        url = f"{self.server.url}/{name}/commit/{repo.head}"
        self.send({"success": True, "commitOid": repo.head, "commitUrl": url, "hookOutput": ""})

    def resolve(self, request: Request, name: str, path: str, query: Any) -> None:
        repo = self.allowed(name)
        if repo is None:
            return
        if path not in repo.files:
            self.error(404, "EntryNotFound", "Entry not found", X_Repo_Commit=repo.head)
            return
        content = repo.files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.send(content, ETag=etag, X_Repo_Commit=repo.head, Accept_Ranges="none")


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate_yaml),
    (rf"/api/models/{_NAME}(?:/revision/\w+)?", Handler.info),
    (rf"/api/models/{_NAME}/tree/\w+(?:/(.+))?", Handler.tree),
    (rf"/api/models/{_NAME}/preupload/main", Handler.preupload),
    (rf"/api/models/{_NAME}/commit/main", Handler.commit),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"/lfs/(\w+)", Handler.lfs_put),
    (r"/lfs-verify", Handler.lfs_verify),
    (rf"/{_NAME}/resolve/\w+/(.*)", Handler.resolve),
]

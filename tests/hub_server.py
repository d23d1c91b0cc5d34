"""A small fake of the Hub for tests: repositories with commits, served by two servers on this machine.

The first is the Hub; large files are on the second, as on its storage, to which the first sends who asks for them.
What a test wants to go wrong it says in `faults`; `requests` has what came, `sent` counts the bytes of files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secretsecretsecretsecret"
LFS = (".safetensors", ".bin", ".gguf", ".pt")


@dataclass
class Request:
    """One request: which server ("hub" or "storage"), path, Range, and the token that came with it."""

    server: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    """Repositories by name: commits in order, each with its files. `gated`: read only with TOKEN."""

    repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    # Asked before each answer, with the request and the bytes to be sent: a status, bytes to send instead, or a number
    # of bytes after which the connection is cut; None to answer as it is.
    fault: Callable[[Request, bytes], int | bytes | tuple[str, int] | None] | None = None
    sizes: dict[str, int] = field(default_factory=dict)  # lies of the API, by file
    ranges: Literal["sent", "moved", "ignored"] = "sent"  # moved: other bytes come, and the answer says so
    sent: int = 0
    uploaded: dict[str, bytes] = field(default_factory=dict)  # large files that came, by their SHA-256
    url: str = ""
    storage: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def push(self, repository: str, files: dict[str, bytes] | Path) -> str:
        """A new commit with exactly these files; its name."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        commits = self.repositories.setdefault(repository, [])
        commit = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits.append((commit, files))
        return commit

    def commit(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision names."""
        commits = self.repositories[repository]
        if revision == "main":
            return commits[-1]
        return next((commit for commit in commits if commit[0] == revision), None)

    def count(self, nbytes: int) -> None:
        """Note bytes that went out."""
        with self._lock:
            self.sent += nbytes

    def forget(self) -> None:
        """Forget what came and went."""
        self.requests.clear()
        self.sent = 0


def is_lfs(name: str) -> bool:
    """Whether a file is in LFS."""
    return name.endswith(LFS)


def etag(name: str, data: bytes) -> str:
    """What the Hub calls the bytes of a file."""
    if is_lfs(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that listens until the end of the block."""
    hub = Hub()
    servers = []
    for name in ("hub", "storage"):
        handler = type("Handler", (_Handler,), {"hub": hub, "name": name, "protocol_version": "HTTP/1.1"})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
    hub.url, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    name: str

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        request = Request(self.name, path, self.headers.get("Range"), token)
        self.hub.requests.append(request)
        self._request = request
        if self.name == "storage":
            self._storage(path)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._api(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._answer(404)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._request = Request(self.name, path, None, None)
        self.hub.requests.append(self._request)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        if path == "/api/repos/create":
            name = f"{lines[0]['organization']}/{lines[0]['name']}"
            self.hub.push(name, {".gitattributes": b""})
            self._json({"url": f"{self.hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if is_lfs(file["path"]) else "regular"}
                for file in lines[0]["files"]
            ]
            self._json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json({"transfer": "basic", "objects": [self._wanted(one) for one in lines[0]["objects"]]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], lines)
        else:
            self._answer(404)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self._request = Request(self.name, self.path, None, None)
        self.hub.requests.append(self._request)
        fault = self.hub.fault(self._request, data) if self.hub.fault else None
        if fault is None:
            assert self.path == f"/upload/{hashlib.sha256(data).hexdigest()}"
            self.hub.uploaded[self.path.rpartition("/")[2]] = data
        self._answer(200)

    def _wanted(self, one: dict[str, object]) -> dict[str, object]:
        """How a large file is to be sent, or nothing where it is there."""
        if one["oid"] in self.hub.uploaded:
            return one
        return {**one, "actions": {"upload": {"href": f"{self.hub.storage}/upload/{one['oid']}", "header": {}}}}

    def _commit(self, repository: str, lines: list[dict[str, dict[str, str]]]) -> None:
        parent, files = self.hub.repositories[repository][-1]
        header, files = lines[0]["value"], dict(files)
        if header.get("parentCommit") not in (None, parent):
            self._answer(412)
            return
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.uploaded[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commit = self.hub.push(repository, files)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repository}/commit/{commit}"})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _api(self, repository: str, revision: str) -> None:
        if to := self.hub.renamed.get(repository):
            self._answer(307, b"", {"Location": f"/api/models/{to}/revision/{revision}?blobs=true"})
        elif repository not in self.hub.repositories:
            self._answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif (found := self.hub.commit(repository, revision)) is None:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            commit, files = found
            siblings = []
            for name, data in files.items():
                size = self.hub.sizes.get(name, len(data))
                entry: dict[str, object] = {"rfilename": name, "size": size, "blobId": etag("", data)}
                if is_lfs(name):
                    entry["lfs"] = {"sha256": etag(name, data), "size": size, "pointerSize": 130}
                siblings.append(entry)
            body = {"_id": "0", "id": repository, "modelId": repository, "sha": commit, "siblings": siblings}
            self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        if to := self.hub.renamed.get(repository):
            self._answer(307, b"", {"Location": f"/{to}/resolve/{revision}/{name}"})
            return
        if repository in self.hub.gated and self._request.token != TOKEN:
            code = 403 if self._request.token else 401
            self._answer(code, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
            return
        found = self.hub.commit(repository, revision)
        if found is None or name not in found[1]:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data, headers = found[1][name], {"X-Repo-Commit": found[0]}
        if is_lfs(name):
            linked = {"X-Linked-Etag": f'"{etag(name, data)}"', "X-Linked-Size": str(len(data))}
            place = f"{self.hub.storage}/{repository}/{found[0]}/{name}?Signature=signed-and-secret"
            self._answer(302, b"", {**headers, **linked, "Location": place})
        else:
            self._file(data, {**headers, "ETag": f'"{etag(name, data)}"'})

    def _storage(self, path: str) -> None:
        _, organisation, name, commit, file = path.split("/", 4)
        found = self.hub.commit(f"{organisation}/{name}", commit)
        assert found is not None
        self._file(found[1][file], {})

    def _file(self, data: bytes, headers: dict[str, str]) -> None:
        wanted, status = self._request.range, 200
        size = len(data)
        if wanted and self.hub.ranges != "ignored":
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start) + (self.hub.ranges == "moved"), min(int(stop or size), size - 1)
            if first >= size:
                self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            data, status = data[first : last + 1], 206
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}
        self._answer(status, data, headers, file=True)

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, file: bool = False
    ) -> None:
        fault = self.hub.fault(self._request, body) if self.hub.fault else None
        sent = len(body)
        match fault:
            case int():
                status, body, headers, sent = fault, b"", {"Retry-After": "0"}, 0
            case bytes():
                body, sent = fault, len(fault)
            case ("cut", after):
                sent = after
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:sent])
        if file:
            self.hub.count(sent)
        if sent < len(body):
            self.wfile.flush()
            self.close_connection = True

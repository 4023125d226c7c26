"""A stand-in for the hub on loopback: what its client asks for in fetching and publishing, and every way to fail at it.

Bound to 127.0.0.1; no other address is ever asked. Two servers: the hub, and the storage it redirects large files to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

LARGE_BYTES = 4096  # files of this size and more lie in the storage, as LFS files do


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Commits of one model, the branches that point at them, and what its card says."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit with exactly these files; the branch points at it then."""
        listing = json.dumps({path: git_sha1(data) for path, data in sorted(files.items())})
        sha = hashlib.sha1(f"{len(self.commits)} {listing}".encode()).hexdigest()
        self.commits[sha], self.refs[branch] = dict(files), sha
        return sha


@dataclass
class Fault:
    """What goes wrong: for requests of `method` whose path `pattern` matches, `times` times."""

    pattern: str
    status: int = 0  # answered in place of the content; 0: the content is harmed
    cut_after: int | None = None  # bytes of the body, then the connection ends
    longer: bytes = b""  # sent after the body, its length told so
    other: bytes | None = None  # sent in place of the content
    times: int = 1
    method: str = "GET"


@dataclass
class Hub:
    """The servers and what they hold; `asked` = (method, path, headers) of each request, in order."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # of the storage, by sha256
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    token: str | None = None  # that is asked of who writes, or reads what is gated
    plain: dict[str, bytes] = field(default_factory=dict)  # files of no model at `elsewhere`, by path
    plain_etag: bool = True
    hub_port: int = 0
    storage_port: int = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.hub_port}"

    @property
    def elsewhere(self) -> str:
        return f"http://127.0.0.1:{self.storage_port}"

    def add(self, name: str, files: dict[str, bytes], **card: Any) -> str:
        """A repository with one commit on main; its commit."""
        repository = self.repositories.setdefault(name, Repository(card=card))
        return repository.commit(files)

    def paths(self, method: str) -> list[str]:
        return [path for how, path, _ in self.asked if how == method]

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.pattern, path):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    storage = False

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = unquote(self.path)
        self.hub.asked.append((method, path, {key.lower(): value for key, value in self.headers.items()}))
        self.body = self.rfile.read(int(self.headers.get("content-length") or 0))
        fault = self.hub.fault(method, path)
        if fault is not None and fault.status:
            return self._send(fault.status, b'{"error": "as asked"}')
        if self.storage and path in self.hub.plain:
            return self._file(self.hub.plain[path], fault, {"ETag": f'"{sha256(self.hub.plain[path])}"'} if self.hub.plain_etag else {})
        if self.storage:
            return self._of_storage(method, path, fault)
        repository = next((name for name in self.hub.repositories if re.match(rf"/(api/models/|api/datasets/|datasets/)?{re.escape(name)}([/.?]|$)", path)), None)
        if method in ("POST", "PUT"):
            return self._write(path, repository)
        if repository is None:
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        if self.hub.repositories[repository].gated and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        return self._read(path, repository, fault)

    # --- reading ---------------------------------------------------------------------------------

    def _read(self, path: str, name: str, fault: Fault | None) -> None:
        repository = self.hub.repositories[name]
        if (match := re.match(r"/[^/]+/[^/]+/resolve/([^/]+)/(.+)", path)) is not None:
            commit = repository.refs.get(match[1], match[1])
            data = repository.commits.get(commit, {}).get(match[2])
            if data is None:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            if len(data) < LARGE_BYTES:
                return self._file(data, fault, {"ETag": f'"{git_sha1(data)}"', "X-Repo-Commit": commit})
            self.hub.stored[sha256(data)] = data
            where = f"http://127.0.0.1:{self.hub.storage_port}/{sha256(data)}"
            headers = {"Location": where, "X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": commit}
            return self._send(302, b"", headers)
        match = re.match(rf"/api/(?:models|datasets)/{re.escape(name)}(?:/revision/([^?]+))?(?:/tree/([^?/]+)[^?]*)?(?:\?|$)", path)
        revision = (match and (match[1] or match[2])) or "main"
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if "/tree/" in path:
            return self._json([_in_tree(file, data) for file, data in sorted(files.items())])
        siblings = [_sibling(file, data) for file, data in sorted(files.items())]
        return self._json({"id": name, "sha": commit, "siblings": siblings, "cardData": repository.card, "private": False, "tags": []})

    def _of_storage(self, method: str, path: str, fault: Fault | None) -> None:
        digest = path.strip("/").partition("?")[0]
        if method == "PUT":
            self.hub.stored[digest] = self.body
            return self._send(200, b"", {"ETag": f'"{sha256(self.body)}"'})
        data = self.hub.stored.get(digest)
        return self._send(404, b"") if data is None else self._file(data, fault, {"ETag": f'"{digest}"'})

    def _file(self, data: bytes, fault: Fault | None, headers: dict[str, str]) -> None:
        if fault is not None and fault.other is not None:
            data = fault.other
        data += fault.longer if fault is not None else b""
        start, status = 0, 200
        if (wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")) is not None:
            start, status = int(wanted[1]), 206
            if start >= len(data):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        return self._send(status, data[start:], headers, fault.cut_after if fault is not None else None)

    # --- writing ---------------------------------------------------------------------------------

    def _write(self, path: str, name: str | None) -> None:
        if self.hub.token is not None and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            return self._send(401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            asked = json.loads(self.body)
            full = f"{asked.get('organization') or 'me'}/{asked['name']}"
            new = full not in self.hub.repositories
            self.hub.repositories.setdefault(full, Repository()).refs or self.hub.repositories[full].commit({})
            return self._json({"url": f"{self.hub.address}/{full}", "name": full, "id": full}, 200 if new else 409)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if name is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        repository = self.hub.repositories[name]
        if "/preupload/" in path:
            files = json.loads(self.body)["files"]
            modes = [{"path": one["path"], "uploadMode": "lfs" if one["size"] >= LARGE_BYTES else "regular", "shouldIgnore": False,
                      "oid": git_sha1(repository.commits[repository.refs["main"]].get(one["path"], b"")) if one["path"] in repository.commits[repository.refs["main"]] else None}
                     for one in files]  # fmt: skip
            return self._json({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch()
        if path.endswith("/verify"):
            asked = json.loads(self.body)
            known = self.hub.stored.get(asked["oid"])
            return self._send(200 if known is not None and len(known) == asked["size"] else 404, b"")
        if "/commit/" in path:
            return self._commit(repository, name)
        return self._send(404, b"")

    def _batch(self) -> None:
        objects = []
        for one in json.loads(self.body)["objects"]:
            known: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.stored or len(self.hub.stored[one["oid"]]) != one["size"]:
                known["actions"] = {"upload": {"href": f"http://127.0.0.1:{self.hub.storage_port}/{one['oid']}", "header": {}}}
            objects.append(known)
        return self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _commit(self, repository: Repository, name: str) -> None:
        import base64

        files = dict(repository.commits[repository.refs["main"]])
        for line in self.body.splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    return self._send(400, b'{"error": "LFS pointer pointed to a file that does not exist"}')
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif one["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = repository.commit(files)
        if files.get("README.md", b"").startswith(b"---"):
            repository.card = yaml.safe_load(files["README.md"].decode().split("---")[1])
        return self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.address}/{name}/commit/{sha}", "hookOutput": ""})

    # --- sending ---------------------------------------------------------------------------------

    def _json(self, value: Any, status: int = 200, kind: str = "application/json") -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": kind})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut_after: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body if cut_after is None else body[:cut_after])
        if cut_after is not None:
            self.close_connection = True


def _sibling(file: str, data: bytes) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 130}} if len(data) >= LARGE_BYTES else {}
    return {"rfilename": file, "size": len(data), "blobId": git_sha1(data), **lfs}


def _in_tree(file: str, data: bytes) -> dict[str, Any]:
    lfs = {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}} if len(data) >= LARGE_BYTES else {}
    return {"type": "file", "path": file, "size": len(data), "oid": git_sha1(data), **lfs}


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Both servers, until the end."""
    hub = Hub()
    servers = []
    for storage in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "storage": storage})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
    hub.hub_port, hub.storage_port = (server.server_address[1] for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def asked_by_this_process(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in; the client is online, without a token and with an empty cache, in an empty working folder."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what came of a chunk that was cut is lost
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(scratch / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(scratch / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries, of the client's and of ours
        (scratch / "here").mkdir()
        monkeypatch.chdir(scratch / "here")
        yield server
        close_session()


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder as a commit's files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

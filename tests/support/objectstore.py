"""An S3 server on loopback (moto's), with a proxy before it that counts what is read and makes a network's faults."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import logging
import random
import socketserver
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

BUCKET = "bucket"
_HOP_BY_HOP = ("transfer-encoding", "connection", "expect", "content-length", "trailer", "te")
KINDS = ("503", "cut", "short", "slow", "wrong")


class Faulty(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Forwards to `target`. Of GETs a share fails once each, by turns in every way of `KINDS`."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.share, self.draws = target, 0.0, random.Random(7)
        self.asked: Counter[str] = Counter()  # GETs by object
        self.sent: Counter[str] = Counter()  # bytes by object
        self.faults: Counter[str] = Counter()
        self.failed: set[tuple[str, str | None]] = set()  # each once
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, path: str, span: str | None) -> str | None:
        with self.lock:
            if (path, span) in self.failed or self.draws.random() >= self.share:
                return None
            self.failed.add((path, span))
            kind = KINDS[self.faults.total() % len(KINDS)]
            self.faults[kind] += 1
            return kind


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def log_message(self, *_: Any) -> None:
        pass

    def _forward(self) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        upstream.request(self.command, self.path, self._body(), headers)
        answer = upstream.getresponse()
        data = answer.read()
        fault = self.server.fault(self.path, self.headers.get("Range")) if self.command == "GET" and answer.status < 300 else None
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "slow":
            time.sleep(0.3)
        if fault == "wrong" and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        told = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", told or "0")
        self.end_headers()
        if self.command != "HEAD":
            name = self.path.partition("?")[0].removeprefix(f"/{BUCKET}/")
            with self.server.lock:
                self.server.asked[name] += 1
                self.server.sent[name] += len(data)
            self.wfile.write(data[: len(data) // 2] if fault in ("cut", "short") else data)
        if fault in ("cut", "short"):
            self.close_connection = True

    def _body(self) -> bytes | None:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            length = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(length) if length else None
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return found

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward


@contextlib.contextmanager
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """The proxy before a fresh server with one empty bucket; the environment names it, for child processes too."""
    server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    behind = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    behind.start()
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{behind.get_host_and_port()[1]}/moto-api/reset", method="POST")).close()
    proxy = Faulty(behind.get_host_and_port()[1])
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    for name, value in {"AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something",
                        "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    from pyarrow import fs

    fs.S3FileSystem(endpoint_override=proxy.url, allow_bucket_creation=True).create_dir(BUCKET)
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        behind.stop()

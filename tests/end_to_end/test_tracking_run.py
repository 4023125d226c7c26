"""Whatever happens to wandb and the network during a run: same weights, complete metrics, no waiting."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import synthetic
from faketrackers import fake_wandb, services
from stages import Stage, result

from train.base.errors import ExitCode
from train.observe import trackers
from train.observe.tracker import Tracker

pytestmark = pytest.mark.slow

FAULTS = {  # as test_tracker.Fake does them
    "never opens": "open: hang",
    "refuses": "open: raise",
    "ends its thread": "open: exit",
    "fails under way": "write: raise",
    "hangs under way": "write: hang",
    "hangs at the end": "close: hang",
}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that each call of `log` held up the training; short waits for the trackers."""
    spent: list[float] = []
    real = Tracker.log

    def log(self: Tracker, *arguments: Any, **named: Any) -> None:
        before = time.perf_counter()
        real(self, *arguments, **named)
        spent.append(time.perf_counter() - before)

    monkeypatch.setattr(Tracker, "log", log)
    monkeypatch.setattr(trackers, "INIT_S", 3.0)
    monkeypatch.setattr(trackers, "CLOSE_S", 4.0)
    monkeypatch.setattr(trackers, "KILL_S", 1.0)
    return spent


def check(stage: Stage, straight: Path, spent: list[float], *overrides: str) -> None:
    assert stage.run(*overrides) == ExitCode.DONE, stage.message
    assert result(stage.output) == result(straight)
    assert len(synthetic.metrics(stage.output)) == len(spent) == 9
    assert sorted(spent)[len(spent) // 2] < 0.05  # the median: other processes share the cores


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_tracker(
    fault: str, straight: Path, dataset: Path, base_model: Path, tmp_path: Path, timed: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fake_wandb(monkeypatch, [], FAULTS[fault])
    check(Stage(tmp_path, dataset, base_model), straight, timed, "tracking.wandb=online")


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers everything with status 500."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def server(kind: str) -> Iterator[str]:
    """The address of a service that fails in one way."""
    if kind == "refused":
        yield "http://127.0.0.1:9"
    elif kind == "silent":
        with socket.create_server(("127.0.0.1", 0)) as listening:  # accepts, never answers
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    else:
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as running:
            threading.Thread(target=running.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{running.server_port}"
            running.shutdown()


@pytest.mark.parametrize("kind", ["refused", "silent", "status 500"])
def test_faults_of_the_network(
    kind: str, straight: Path, dataset: Path, base_model: Path, tmp_path: Path, timed: list[float]
) -> None:
    with server(kind) as address:
        environment: Mapping[str, str] = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0123456789" * 4}
        stage = Stage(tmp_path, dataset, base_model)
        os.environ.update(environment)
        try:
            check(stage, straight, timed, "tracking.wandb=online")
        finally:
            for name in environment:
                del os.environ[name]
    assert services() == []
    written = b"".join(path.read_bytes() for path in stage.output.rglob("*") if path.is_file())
    assert b"0123456789" * 4 not in written
